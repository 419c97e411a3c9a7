"""Whatever the folders are called, whatever rights the user has: it is served, or one sentence says why not."""

import errno
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from server import EmbeddedServer, ServerError, workspace
from server.installation import PYTHON_VERSION, find_installation
from server.triton_log import model_process_failure
from tests.helpers import tiny_repository as tiny

pytestmark = pytest.mark.server

NAMES = [
    "with space",
    "größer 犬",
    "it's",
    'a "quote"',
    "$HOME; false",
    "$(false) `false`",
    "new\nline",
    "-dash",
    "a:colon",
    "back\\slash",
    "*?[glob]",
    "#hash & more | > x",
    "~tilde",
]
PLAIN = ["models", "a.b_c-d+e@f%g,h=i", "-dash"]
WITHOUT_RIGHTS = (
    "setpriv",
    "--bounding-set=-dac_override,-dac_read_search",
    "--inh-caps=-dac_override,-dac_read_search",
)
"""What makes even root ask for rights."""


def served(repository: Path) -> str:
    """Serve the repository, and return the log."""
    with EmbeddedServer(repository, ready_timeout_s=60, stop_timeout_s=10) as server:
        return server.log_text()


def fill(repository: Path) -> Path:
    """Put an ONNX model and a Python one into a repository."""
    tiny.add_double(repository)
    shutil.copytree(tiny.ROOT / "model_repository" / "jobs", repository / "jobs")
    return repository


@pytest.mark.parametrize("name", NAMES[:3], ids=ascii)
def test_a_repository_is_served_whatever_it_is_called(tmp_path, name):
    assert "successfully loaded 'jobs'" in served(fill(tmp_path / name / name))


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_triton_gets_a_plain_path_for_every_name(tmp_path, name):
    (tmp_path / name).mkdir()
    place = workspace.create_workspace(find_installation())
    try:
        link = place.plain(tmp_path / name)
        assert workspace.is_plain(link)
        assert link.samefile(tmp_path / name)
        assert place.plain(tmp_path / name) == link
    finally:
        shutil.rmtree(place.root)


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_path_stays_as_it_is(name):
    assert workspace.is_plain(Path("/srv", name))


def test_a_failing_model_is_named_with_its_real_path(tmp_path):
    repository = tmp_path / "größer 犬"
    tiny.add_double(repository, config=tiny.DOUBLE_CONFIG.replace("max_batch_size", "maximum"))
    with pytest.raises(ServerError) as caught:
        served(repository)
    assert f"{repository}/double/config.pbtxt" in str(caught.value)


def test_a_temporary_folder_with_a_space_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(workspace.tempfile, "tempdir", str(tmp_path))
    fill(tmp_path / "models")
    (tmp_path / "tmp ü").mkdir()
    monkeypatch.setattr(workspace.tempfile, "tempdir", str(tmp_path / "tmp ü"))
    assert "successfully loaded 'double'" in served(tmp_path / "models")
    assert list((tmp_path / "tmp ü").iterdir()) == []


def no_workspace() -> str:
    with pytest.raises(ServerError) as caught:
        workspace.create_workspace(find_installation())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_any_temporary_folder_each_is_named_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "with space").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(workspace.tempfile, "tempdir", str(tmp_path / "with space"))
    monkeypatch.setattr(workspace, "_OTHER_TEMPORARY_FOLDERS", (str(tmp_path / "none"), str(tmp_path / "file")))
    sentence = no_workspace()
    assert f"{tmp_path}/with space: its path has more than ASCII letters" in sentence
    assert f"{tmp_path}/none: {os.strerror(errno.ENOENT)}" in sentence
    assert f"{tmp_path}/file: {os.strerror(errno.ENOTDIR)}" in sentence
    assert sentence.endswith("set TMPDIR to one where it can.")


def test_a_full_temporary_folder_is_named(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(workspace.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(workspace.shutil, "copy2", fail)
    assert f"{tmp_path} can't be used (No space left on device)" in no_workspace()
    assert list(tmp_path.iterdir()) == []


def test_a_virtual_environment_with_a_space_in_its_path_is_linked(tmp_path, monkeypatch):
    environment = tmp_path / "a ü venv"
    (environment / "bin").mkdir(parents=True)
    packages = environment / "lib" / f"python{PYTHON_VERSION}" / "site-packages"
    packages.mkdir(parents=True)
    for name in ("pyvenv.cfg", "bin/python3"):
        (environment / name).symlink_to(Path(sys.prefix) / name)
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        (packages / package.name).symlink_to(package)
    (packages / "editable.pth").write_text("/somewhere/größer/src\n", encoding="utf-8")
    monkeypatch.setattr(sys, "prefix", str(environment))
    monkeypatch.setattr(sys, "executable", str(environment / "bin" / "python3"))
    place = workspace.create_workspace(find_installation())
    try:
        code = "import sys, numpy; print(sys.prefix)"
        done = subprocess.run(
            [place.command_directory / "python3", "-c", code], capture_output=True, text=True, timeout=60
        )
        assert done.stdout.strip() == str(place.command_directory.parent), done.stderr
        assert workspace.is_plain(place.command_directory)
        assert not list(place.root.glob("venv/lib/*/site-packages/editable.pth")), "Triton's Python ends there"
    finally:
        shutil.rmtree(place.root)


@pytest.mark.parametrize("place", ["double/1/model.onnx", "double/config.pbtxt", "double/1", "double", "."])
def test_what_the_user_may_not_read_is_named(tmp_path, place):
    if os.geteuid() == 0 and not shutil.which("setpriv"):
        pytest.skip("root reads everything, and there is no setpriv to change that")
    repository = fill(tmp_path / "models")
    mode = (repository / place).stat().st_mode
    (repository / place).chmod(0)
    done = subprocess.run(
        [
            *(WITHOUT_RIGHTS if os.geteuid() == 0 else ()),
            sys.executable,
            "-m",
            "server",
            "--model-repository",
            repository,
        ],
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    (repository / place).chmod(mode)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: The model repository {repository} can't be read (Permission denied: ")
    assert str(repository / place) in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_user_whom_the_system_does_not_know_gets_a_home(monkeypatch):
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    place = workspace.create_workspace(find_installation())
    try:
        assert place.home() == {}
        monkeypatch.setattr(workspace.Path, "home", unknown)
        home = place.home()
        assert Path(home["HOME"]) == place.root
        assert home["USER"] == str(os.geteuid())
    finally:
        shutil.rmtree(place.root)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("bash: line 1: /srv/x: No such file or directory\n", "/srv/x: No such file or directory."),
        ("/t/triton_python_backend_stub: error while loading shared libraries: a.so: no\n", "loading shared libraries"),
        ("terminate called after throwing an instance of 'std::x'\n  what():  stol\n", "stol."),
    ],
)
def test_a_process_that_could_not_start_is_told_at_once(log, reason):
    failure = model_process_failure(f"I1125 first line\n{log}I1125 last line\n")
    assert failure.startswith("A Python model's process could not start: ")
    assert reason in failure
    assert model_process_failure('I1125 1 server.cc:1] "what():  no"\n') == ""
