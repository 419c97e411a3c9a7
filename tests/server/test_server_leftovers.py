"""Whatever is killed, alone or together, nothing of dead servers stays, and nothing of others is touched."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from itertools import combinations
from pathlib import Path

import pytest

from server import leftovers, supervisor, workspace
from server.leftovers import OWNER_FILE, owner_tag, region_prefix, remove_leftovers
from server.stubs import find_stubs, is_alive, start_time
from server.supervisor import BoundedLog, EnvironmentFolder
from tests.helpers import tiny_repository as tiny
from tests.helpers import waiting
from tests.helpers.server_runner import Runner

SLEEPING_CODE = """
import time
from pathlib import Path

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        Path(__file__).with_name("running").touch()
        time.sleep(4)
        return [pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(r, "x")]) for r in requests]
"""
CONFIG = tiny.tensors("TYPE_FP32 dims: [ 1 ]", "TYPE_FP32 dims: [ 1 ]")
PROCESSES = ("runner", "supervisor", "tritonserver", "stub")
COMBINATIONS = [c for size in (1, 2, 3, 4) for c in combinations(PROCESSES, size) if c != ("stub",)]
OTHER_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def runner(tmp_path):
    """A runner over a model that takes four seconds, and the job board."""
    tiny.add_python_model(tmp_path / "repository", "sleeping", SLEEPING_CODE, CONFIG)
    shutil.copytree(tiny.ROOT / "model_repository" / "jobs", tmp_path / "repository" / "jobs")
    runner = Runner(tmp_path)
    runner.address = runner.wait_until_ready().split()[1].removeprefix("http://")
    yield runner
    runner.process.kill()
    runner.end()


def ask(address: str) -> None:
    """Send a request; whatever comes of it."""
    connection = http.client.HTTPConnection(address, timeout=20)
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("POST", "/v2/models/sleeping/infer", json.dumps(body))
        connection.getresponse().read()
    connection.close()


@pytest.mark.server
@pytest.mark.parametrize(("number", "victims"), list(enumerate(COMBINATIONS)), ids=map("+".join, COMBINATIONS))
def test_nothing_is_left_by_whatever_is_killed_together(runner, number, victims):
    server = runner.pid_of("tritonserver")
    pids = {
        "runner": runner.process.pid,
        "supervisor": runner.supervisor_pid(),
        "tritonserver": server,
        "stub": next(stub.pid for stub in find_stubs(server) if stub.model == "sleeping"),
    }
    [board] = runner.job_boards()
    environment_folders = runner.environment_folders()
    request = threading.Thread(target=ask, args=[runner.address])
    if number % 2:
        request.start()
        waiting.wait_until((runner.repository / "sleeping/1/running").exists, 10, "the request has come to the model")
    for victim in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[victim], signal.SIGKILL)
    runner.process.send_signal(signal.SIGTERM)
    runner.end()
    waiting.wait_until(lambda: not tiny.processes_of(runner.repository.parent), 15, "all processes have ended")
    remove_leftovers([runner.temporary])  # as the next start does
    waiting.wait_until(lambda: not runner.traces(), 15, "no trace is left")
    assert not board.exists()
    assert not any(path.exists() for path in environment_folders)
    if number % 2:
        request.join()


def make_workspace(parent: Path, owner: str | None) -> Path:
    folder = parent / "embedded-triton-x"
    folder.mkdir(parents=True)
    if owner is not None:
        (folder / OWNER_FILE).write_text(owner)
    return folder


def dead_tag() -> str:
    """The tag of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    tag = owner_tag(process.pid)
    process.communicate(b"\n")
    return tag


def reused_tag() -> str:
    """The tag of an earlier process with the id of one that lives."""
    return f"{owner_tag().rpartition('_')[0]}_{int(start_time(os.getpid())) - 1}"


def foreign_tag() -> str:
    """The tag of a process in another namespace of process ids."""
    namespace, _, rest = dead_tag().partition("_")
    return f"{int(namespace) + 1}_{rest}"


@pytest.fixture
def shared_memory(tmp_path, monkeypatch):
    """A folder in the place of /dev/shm."""
    folder = tmp_path / "shm"
    folder.mkdir()
    for module in (leftovers, supervisor):
        monkeypatch.setattr(module, "SHARED_MEMORY", folder)
    return folder


def test_what_a_zombie_has_left_is_swept(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        folder = make_workspace(tmp_path, owner_tag(process.pid))
        process.kill()
        waiting.wait_until(lambda: not is_alive(process.pid), 5, "it is dead, and nobody has asked for its status")
        remove_leftovers([tmp_path])
        assert not folder.exists()


def fill(folder: Path, tag: str) -> list[Path]:
    """A workspace, a region and a job board of one owner."""
    made = [make_workspace(folder / "temporary" / tag, tag)]
    made += [
        folder / "shm" / f"{leftovers.REGION_PREFIX}{tag}_0a1b2c3d_uuid",
        folder / f"shm/audioldm2_jobs_{tag}_jobs",
    ]
    made[1].touch()
    made[2].mkdir()
    (made[2] / "entry").touch()
    return made


@pytest.mark.parametrize(
    ("tag", "goes"),
    [(dead_tag, True), (reused_tag, True), (owner_tag, False), (foreign_tag, False)],
    ids=["dead", "id used again", "alive", "other namespace"],
)
def test_only_what_belongs_to_a_dead_process_is_swept(tmp_path, shared_memory, tag, goes):
    tag = tag()
    made = fill(tmp_path, tag)
    remove_leftovers([tmp_path / "temporary" / tag, tmp_path / "missing"])
    assert [path.exists() for path in made] == [not goes] * 3
    assert shared_memory.is_dir()


@pytest.mark.parametrize("owner", [None, "", "x", "1_2", "\xff"])
def test_a_workspace_that_does_not_tell_its_owner_is_left_alone(tmp_path, owner):
    folder = make_workspace(tmp_path, owner)
    remove_leftovers([tmp_path])
    assert folder.is_dir()


def test_what_has_other_names_is_left_alone(tmp_path, shared_memory):
    names = [f"other_{dead_tag()}", f"{leftovers.REGION_PREFIX}0a1b", "audioldm2_jobs_x", f"audioldm2_{dead_tag()}"]
    for name in names:
        (shared_memory / name).touch()
    remove_leftovers([tmp_path])
    assert {path.name for path in shared_memory.iterdir()} == set(names)


def test_a_link_is_never_followed(tmp_path, shared_memory):
    valuable = tmp_path / "valuable"
    valuable.mkdir()
    (valuable / OWNER_FILE).write_text(dead_tag())
    (tmp_path / "embedded-triton-link").symlink_to(valuable)
    (shared_memory / f"audioldm2_jobs_{dead_tag()}_jobs").symlink_to(valuable)
    remove_leftovers([tmp_path])
    assert (valuable / OWNER_FILE).exists()


@needs_root
@pytest.mark.usefixtures("shared_memory")
def test_what_belongs_to_another_user_is_left_alone(tmp_path):
    made = fill(tmp_path, tag := dead_tag())
    for path in made:
        os.chown(path, 65534, 65534)
    remove_leftovers([tmp_path / "temporary" / tag])
    assert all(path.exists() for path in made)


def test_a_start_sweeps_the_places_where_workspaces_may_be(tmp_path, monkeypatch):
    stale = make_workspace(tmp_path, dead_tag())
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(workspace.tempfile, "tempdir", None)
    root = workspace.make_private_folder()
    assert not stale.exists()
    assert root.parent == tmp_path


@pytest.fixture
def environments(tmp_path, monkeypatch):
    """A folder in the place of /tmp, where Triton makes `python_env_*`."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(supervisor, "TRITON_TEMPORARY_FOLDER", folder)
    return folder


def test_tritons_own_folder_is_noted_down_and_removed(tmp_path, environments, monkeypatch):
    (environments / "python_env_before").mkdir()
    found = EnvironmentFolder(tmp_path / supervisor.ENVIRONMENT_FOLDER_FILE)
    (environments / "python_env_mine00").mkdir()
    found.find(os.getpid())  # no child yet, so it may still come
    monkeypatch.setattr(supervisor, "_has_children", lambda _: True)
    found.find(os.getpid())
    (environments / "python_env_after0").mkdir()
    found.find(os.getpid())
    supervisor.remove_environment_folder(tmp_path)
    assert {path.name for path in environments.iterdir()} == {"python_env_before", "python_env_after0"}


def test_of_two_new_folders_nobody_knows_whose_they_are(tmp_path, environments, monkeypatch):
    found = EnvironmentFolder(tmp_path / supervisor.ENVIRONMENT_FOLDER_FILE)
    monkeypatch.setattr(supervisor, "_has_children", lambda _: True)
    for name in ("python_env_mine00", "python_env_yours0"):
        (environments / name).mkdir()
    found.find(os.getpid())
    supervisor.remove_environment_folder(tmp_path)
    assert len(list(environments.iterdir())) == 2


@pytest.mark.parametrize("path", ["{0}/tmp/other", "{0}/python_env_000000", "{0}/tmp/../tmp/python_env_00000", ""])
def test_no_other_folder_can_be_noted_down(tmp_path, environments, path):
    folder = Path(path.format(tmp_path)) if path else environments
    folder.mkdir(parents=True, exist_ok=True)
    (tmp_path / supervisor.ENVIRONMENT_FOLDER_FILE).write_text(str(folder))
    supervisor.remove_environment_folder(tmp_path)
    assert folder.exists()


def test_a_long_log_gives_its_start_back_to_the_disk_and_can_be_read_on(tmp_path):
    path = tmp_path / "log"
    path.touch()
    log = BoundedLog(path, kept_bytes=1 << 20)
    line = b"x" * 99 + b"\n"
    for _ in range(100):
        os.write(log.file, line * 1000)
        log.trim()
    status = path.stat()
    assert status.st_size == 10_000_000
    assert status.st_blocks * 512 <= (2 << 20) + 100_000
    assert path.read_bytes().endswith(line * 10000)
    os.close(log.file)


def test_a_long_log_is_emptied_where_nothing_else_can_be_done(tmp_path, monkeypatch):
    path = tmp_path / "log"
    path.touch()
    log = BoundedLog(path, kept_bytes=1000)
    monkeypatch.setattr(supervisor._libc, "fallocate", lambda *_: -1)
    for _ in range(50):
        os.write(log.file, b"x" * 100)
        log.trim()
    assert path.stat().st_size <= 2000
    assert b"\0" not in path.read_bytes()
    os.close(log.file)


@pytest.mark.server
@needs_root
def test_another_user_reads_and_writes_nothing(runner):
    server = runner.pid_of("tritonserver")
    [root] = runner.temporary.iterdir()
    regions = [tiny.SHARED_MEMORY / name for name in tiny.shared_memory_of(runner.process.pid)]
    assert len(regions) == 2, "the models' shared memory bears other names"
    places = [*regions, *runner.job_boards(), root, *runner.environment_folders()]
    places += [root / "tritonserver.log", *(Path(f"/proc/{pid}/environ") for pid in (server, runner.process.pid))]
    ask_each = 'for path; do test -r "$path" -o -w "$path" && echo "$path"; done; true'
    found = subprocess.run(
        [*OTHER_USER, "sh", "-c", ask_each, "sh", *places], capture_output=True, text=True, check=True
    )
    assert found.stdout == ""
    assert {path.stat().st_mode & 0o077 for path in places} == {0}, "a folder above them may be all that protects them"


@pytest.mark.server
@needs_root
def test_another_user_reaches_no_socket_and_sees_nothing_on_command_lines(runner):
    marker = "what-nobody-else-sees"
    connection = http.client.HTTPConnection(runner.address, timeout=20)
    body = {"id": marker, "inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}]}
    connection.request("POST", "/v2/models/sleeping/infer", json.dumps(body), {"X-Request-Id": marker})
    waiting.wait_until((runner.repository / "sleeping/1/running").exists, 10, "the request has come to the model")
    [door] = tiny.children_of(runner.process.pid, "server.front")
    [envoy] = tiny.children_of(door, "envoy")
    folders = {Path(p).parent for p in tiny.unix_sockets_of(envoy)}
    sockets = [path for folder in folders for path in folder.iterdir()]
    assert {path.name for path in sockets} >= {"door", "admin", "triton_http", "envoy.yaml", "envoy.log"}
    script = """
import os, socket, sys
for path in sys.argv[2:]:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(path)
    except OSError:
        pass
    else:
        print("reached", path)
    if os.access(path, os.R_OK) or os.access(path, os.W_OK):
        print("open to all", path)
for pid in filter(str.isdecimal, os.listdir("/proc")):
    for name in ("cmdline", "environ"):
        try:
            content = open(f"/proc/{pid}/{name}", "rb").read()
        except OSError:
            continue
        if sys.argv[1].encode() in content and pid != str(os.getpid()):
            print(name, "of", pid)
        if name == "environ" and pid in os.environ["SERVER_PIDS"].split():
            print("environment of", pid)
"""
    pids = " ".join(map(str, [door, envoy, runner.process.pid, runner.pid_of("tritonserver")]))
    found = subprocess.run(
        [*OTHER_USER, "/usr/bin/python3", "-c", script, marker, *map(str, sockets)],
        capture_output=True,
        text=True,
        check=True,
        env={"SERVER_PIDS": pids},
    )
    assert found.stdout == ""
    assert {path.stat().st_mode & 0o077 for path in folders} == {0}
    assert connection.getresponse().status == 200
    connection.close()


def test_a_system_without_seccomp_is_told_of(tmp_path):
    script = """
import ctypes, subprocess, sys
sys.path.insert(0, sys.argv[1])
from server import supervisor
supervisor._SYS_SECCOMP = 1 << 20
done = subprocess.run(["true"], stderr=subprocess.PIPE, preexec_fn=supervisor._keep_umask)
sys.exit(done.stderr.decode() != supervisor.UNPROTECTED)
"""
    subprocess.run([sys.executable, "-c", script, str(tiny.ROOT)], check=True, cwd=tmp_path)


def test_the_filter_changes_nothing_but_what_boost_does(tmp_path):
    script = """
import os, sys
sys.path.insert(0, sys.argv[1])
from server import supervisor
supervisor._keep_umask()
for mode in (0o644, 0o640, 0o755, 0o600):
    file = os.open(f"{mode:o}", os.O_CREAT | os.O_RDWR, 0o666 & ~0o077)
    os.fchmod(file, mode)
    os.open(f"path-{mode:o}", os.O_CREAT | os.O_RDWR, 0o600)
    os.chmod(f"path-{mode:o}", mode)
"""
    subprocess.run([sys.executable, "-c", script, str(tiny.ROOT)], check=True, cwd=tmp_path)
    assert {path.name: f"{path.stat().st_mode & 0o777:o}" for path in tmp_path.iterdir()} == {
        **{mode: mode for mode in ("640", "755", "600")},
        **{f"path-{mode}": mode for mode in ("644", "640", "755", "600")},
        "644": "600",
    }


def test_regions_have_the_names_that_newer_tritons_protect():
    assert region_prefix().startswith(f"triton_python_backend_shm_region_{owner_tag()}_")
    assert region_prefix() != region_prefix()
