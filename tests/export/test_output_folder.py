"""Where an export writes: all of it or nothing, as any user, in any folder; over another checkpoint it says so."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from export import __main__ as command
from export import repository
from export.errors import OutputError
from export.exported import Exported, code_digest, read_record
from export.model_names import FILE_STAGES, ONNX_STAGES, STAGES, ModelNames
from export.output_folder import check_output, install
from tests.helpers.tiny_checkpoint import copy_checkpoint

ROOT = Path(__file__).parents[2]
NAMES = ModelNames()
NOBODY = 65534
NO_SUCH_USER = 54321

SETPRIV = shutil.which("setpriv") or ""

as_root = pytest.mark.skipif(os.getuid() != 0 or not SETPRIV, reason="needs root, and setpriv")


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below `folder`, with its content."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="ein Ördner ") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def run_as(user: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run Python in the repository as a user without a home."""
    clean = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME", "HF_HOME")}
    return subprocess.run(
        [SETPRIV, f"--reuid={user}", f"--regid={user}", "--clear-groups", sys.executable, "-B", *arguments],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


OLD = {
    "vae/config.pbtxt": "old",
    "vae/1/model.onnx": "old",
    "vae/1/model.onnx.data": "old",
    "unet/1/unet/config.json": "old",
    "unet/1/unet/old.safetensors": "old",
    "mine/notes.txt": "kept",
}
NEW = {
    "vae/config.pbtxt": "new",
    "vae/1/model.onnx": "new",
    "unet/1/unet/config.json": "new",
    "unet/1/unet/new.safetensors": "new",
    "audioldm2/config.pbtxt": "new",
}


def test_everything_is_replaced_and_the_rest_stays(tmp_path):
    output, staged = write(tmp_path / "output", OLD), write(tmp_path / "staged", NEW)
    (staged / "audioldm2" / "1").mkdir()
    install(staged, output, [output / "vae/1/model.onnx.data"])
    expected = write(tmp_path / "expected", NEW | {"mine/notes.txt": "kept"})
    (expected / "audioldm2" / "1").mkdir()
    assert tree(output) == tree(expected)


def test_what_a_killed_export_left_is_cleared_away(tmp_path):
    left = {"vae/1/.model.onnx.new": "half", "vae/1/.model.onnx.old": "old", "unet/1/.unet.old/config.json": "old"}
    output, staged = write(tmp_path / "output", left), write(tmp_path / "staged", NEW)
    install(staged, output)
    assert tree(output) == tree(write(tmp_path / "expected", NEW))


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_whatever_goes_wrong_on_the_way_nothing_is_changed(tmp_path, monkeypatch, failure):
    """Fail at the first operation, then at the second, and so on until none is left to fail."""
    output = write(tmp_path / "output", OLD)
    before = tree(output)
    rename, move = Path.rename, shutil.move
    count = limit = 0

    def failing(real):
        def operation(*arguments, **options):
            nonlocal count
            count += 1
            if count == limit:
                raise failure
            return real(*arguments, **options)

        return operation

    monkeypatch.setattr(Path, "rename", failing(rename))
    monkeypatch.setattr(shutil, "move", failing(move))
    failed = 0
    while True:
        staged = write(tmp_path / f"staged {limit}", NEW)
        count, limit = 0, limit + 1
        try:
            install(staged, output, [output / "vae/1/model.onnx.data"])
        except type(failure):
            failed += 1
            assert tree(output) == before, f"operation {limit}"
        else:
            break
    assert failed >= len(NEW) * 2
    assert (output / "vae/1/model.onnx").read_text() == "new"


def test_an_interrupted_export_leaves_no_empty_folder(demo_checkpoint, tmp_path, monkeypatch, capsys):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(repository, "ONNX_STAGES", dict.fromkeys(ONNX_STAGES, interrupt))
    output = tmp_path / "new" / "model repository"
    assert command.main(["--checkpoint", str(demo_checkpoint), "--output", str(output)]) == 130
    assert f"interrupted. Nothing was changed in {output}." in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick_export(monkeypatch) -> None:
    """Export the stages that need no conversion alone."""
    monkeypatch.setattr(repository, "STAGES", FILE_STAGES)
    monkeypatch.setattr(repository, "ONNX_STAGES", {})


@pytest.mark.usefixtures("quick_export")
def test_an_export_over_another_checkpoint_says_so(demo_checkpoint, tmp_path, capsys):
    output = tmp_path / "Modell-Ablage é"
    other = copy_checkpoint(demo_checkpoint, tmp_path / "ein anderer")
    said = []
    for checkpoint in (demo_checkpoint, demo_checkpoint, other):
        assert command.main(["--checkpoint", str(checkpoint), "--output", str(output)]) == 0
        said.append([line for line in capsys.readouterr().err.splitlines() if line.startswith("export: ")])
    assert said == [
        [],
        [],
        [
            f"export: {output} holds audioldm2 of {demo_checkpoint}: that of {other} replaces it once every stage is "
            "verified."
        ],
    ]
    assert read_record(output, NAMES) == Exported(str(other), code_digest(), "cpu")
    assert read_record(output, ModelNames("second")) is None


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is a file: it must be a folder"):
        check_output(tmp_path / "file", NAMES)


@as_root
def test_a_parent_that_cannot_be_written_is_no_obstacle(public_folder):
    """A mounted volume: the folder is the user's, and the one that it is in isn't."""
    output, staged = public_folder / "models", write(public_folder / "staged", NEW)
    output.mkdir()
    for path in (output, *staged.rglob("*"), staged):
        os.chown(path, NOBODY, NOBODY)
    program = (
        "import sys; from pathlib import Path; import shutil; from export.output_folder import *;"
        "output, staged = map(Path, sys.argv[1:]); check_output(output, ModelNames())\n"
        "with staging_folder(output) as folder:\n"
        "    assert folder.parent != output.parent\n"
        "    shutil.copytree(staged, folder, dirs_exist_ok=True)\n"
        "    install(folder, output)"
    )
    finished = run_as(NOBODY, "-c", program, str(output), str(staged))
    assert finished.returncode == 0, finished.stderr
    assert tree(output) == tree(write(public_folder / "expected", NEW))


@as_root
@pytest.mark.parametrize("locked", ["", "tokenizer/1"])
def test_an_output_that_cannot_be_written_is_told_before_anything_else(public_folder, locked):
    output = public_folder / "models"
    (output / "tokenizer" / "1").mkdir(parents=True)
    for path in (output, output / "tokenizer", output / "tokenizer" / "1"):
        path.chmod(0o755 if path == output / locked else 0o777)
    finished = run_as(NOBODY, "-m", "export", "--checkpoint", "/nowhere", "--output", str(output))
    assert finished.returncode == 1
    assert f"--output {output}: this user can't write into {output / locked}. Choose another" in finished.stderr
    assert "Traceback" not in finished.stderr


@as_root
@pytest.mark.parametrize(
    "file",
    [
        "model_index.json",
        "unet",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "tokenizer/tokenizer.json",
        "tokenizer_2/tokenizer_config.json",
        "",
    ],
)
def test_a_file_without_rights_is_told_apart_from_a_damaged_one(demo_checkpoint, public_folder, file):
    checkpoint = Path(shutil.copytree(demo_checkpoint, public_folder / "checkpoint"))
    for path in (checkpoint, *checkpoint.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (checkpoint / file).chmod(0o000)
    output = public_folder / "models"
    output.mkdir()
    output.chmod(0o777)
    finished = run_as(NO_SUCH_USER, "-m", "export", "--checkpoint", str(checkpoint), "--output", str(output))
    assert finished.returncode == 1
    assert "can't be read by this user: permission denied. Allow reading it" in finished.stderr
    assert str(checkpoint / file) in finished.stderr
    assert "damaged" not in finished.stderr
    assert "Traceback" not in finished.stderr
    assert list(output.iterdir()) == []


@as_root
def test_a_user_without_a_home_is_told_about_it(public_folder):
    finished = run_as(NO_SUCH_USER, "-m", "export", "--checkpoint", "~/nothing", "--output", str(public_folder))
    assert finished.returncode == 1
    assert finished.stderr.startswith("export: ")
    assert "Traceback" not in finished.stderr


@pytest.mark.skipif(not sys.prefix.isascii(), reason="Python itself can't start in such an environment in the C locale")
def test_a_path_outside_the_terminals_encoding_can_be_printed(tmp_path):
    """In the C locale Python would write ASCII, and fail."""
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for checkpoint in ("./nirgendwö 音", "nobody/nøthing"):
        finished = subprocess.run(
            [sys.executable, "-m", "export", "--checkpoint", checkpoint, "--output", str(tmp_path / "é")],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            timeout=60,
        )
        assert finished.returncode == 1
        assert b"export: --checkpoint" in finished.stderr
        assert b"Traceback" not in finished.stderr


def test_the_stages_are_named_once():
    assert tuple(repository.ONNX_STAGES) == ONNX_STAGES
    assert tuple(repository.FILE_STAGES) == FILE_STAGES
    committed = {folder.name for folder in repository.COMMITTED_REPOSITORY.iterdir() if folder.is_dir()}
    assert committed == {*STAGES, "audioldm2", "audioldm2_cached", "jobs"}
