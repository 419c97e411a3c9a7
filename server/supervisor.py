"""The process between the runner and tritonserver: whatever happens to either of them, it leaves nothing behind.

It is started as a script of its own and uses the standard library alone. It owns tritonserver (as its parent, and as
the reaper of tritonserver's orphans), and watches its own standard input:

- `stop`: end tritonserver with SIGTERM; shortly before it would cut its callers off, tell its models to answer what
  still runs; and end it with SIGKILL when its time is up;
- `kill`: end it with SIGKILL at once;
- end of file: the runner has finished, or has died. Kill what still runs, remove the temporary folder and go.

Whatever tritonserver and its models make is for this user alone, and the log keeps its last megabytes.

When tritonserver has ended, its remaining Python models are killed and its shared memory is removed. Standard output
carries two lines: `started PID`, and `ended STATUS` (an exit status, or minus the number of the signal that ended it).
"""

import argparse
import contextlib
import ctypes
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, not a temporary file of ours
POLL_S = 0.05
ORPHANS_TIMEOUT_S = 5.0
PRIVATE_UMASK = 0o077
STOP_FILE = "stop"
UNPROTECTED = (
    "Warning: other users of this machine can read this server's shared memory, with its prompts: the system refuses "
    "seccomp filters.\n"
)

KEPT_LOG_BYTES = 8 << 20
"""So much of the end of the log is kept at least, and twice as much at most."""
FIRST_MODEL_TIMEOUT_S = 60.0
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2

TRITON_TEMPORARY_FOLDER = Path("/tmp")  # noqa: S108 - Triton's Python backend knows no other
ENVIRONMENT_FOLDERS = "python_env_??????"
ENVIRONMENT_FOLDER_FILE = "python_env"
"""The file in the workspace with the path of the folder that Triton's Python backend makes for itself."""

_libc = ctypes.CDLL(None, use_errno=True)
_prctl = _libc.prctl
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Supervisor:
    """Runs one tritonserver until it ends or until it is told to end it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._runner_pid = os.getppid()
        self._drain_timeout_s, self._stop_timeout_s = options.drain_timeout_s, options.stop_timeout_s
        self._folders = options.shared_memory_folders
        self._end_requests_at: float | None = None
        self._kill_at: float | None = None
        self.runner_is_gone = False
        self._log = BoundedLog(options.log)
        self._environment_folder = EnvironmentFolder(options.workspace / ENVIRONMENT_FOLDER_FILE)
        self._child = subprocess.Popen(
            options.command[1:],
            stdin=subprocess.DEVNULL,
            stdout=self._log.file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_prepare_child,
        )
        self.pid = self._child.pid

    def run(self) -> int:
        """Obey orders until tritonserver ends.

        Returns:
            Its exit status, or minus the number of the signal that ended it.
        """
        while self._child.poll() is None:
            self._environment_folder.find(self.pid)
            self._log.trim()
            self._obey(self._next_order())
            if self._end_requests_at is not None and time.monotonic() >= self._end_requests_at:
                self._end_requests_at = None
                end_requests(self._folders, self.pid)
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._signal_group(signal.SIGKILL)
        self._signal_group(signal.SIGKILL)
        _reap_orphans()
        return self._child.returncode

    def wait_for_runner(self) -> None:
        """Wait until the runner closes our standard input, or is gone."""
        while not self.runner_is_gone:
            self._next_order()

    def stop(self, *_: object) -> None:
        """Ask tritonserver to end, and kill it when its time is up."""
        if self._kill_at is None:
            self._end_requests_at = time.monotonic() + self._drain_timeout_s
            self._kill_at = time.monotonic() + self._stop_timeout_s
            self._child.send_signal(signal.SIGTERM)

    def _next_order(self) -> bytes:
        if self.runner_is_gone or os.getppid() != self._runner_pid:
            self.runner_is_gone = True
            time.sleep(POLL_S)
            return b"kill"
        readable, _, _ = select.select([sys.stdin.fileno()], [], [], POLL_S)
        if not readable:
            return b""
        orders = os.read(sys.stdin.fileno(), 64)
        self.runner_is_gone = not orders
        return orders or b"kill"

    def _obey(self, orders: bytes) -> None:
        if b"kill" in orders:
            self._kill_at = time.monotonic()
        elif b"stop" in orders:
            self.stop()

    def _signal_group(self, number: int) -> None:
        """Signal tritonserver and its Python models: they share a process group that bears its process id."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


class BoundedLog:
    """Tritonserver's log: the start of its file is given back to the disk when it has become long.

    What stays is where it was, so whoever reads from a position onwards needn't know.

    Args:
        path: A file that exists.
        kept_bytes: So much of its end stays at least, and twice as much at most.
    """

    def __init__(self, path: Path, kept_bytes: int = KEPT_LOG_BYTES) -> None:
        self.file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._kept_bytes = kept_bytes
        self._released = 0

    def trim(self) -> None:
        """Release what is too much."""
        end = os.fstat(self.file).st_size
        if end - self._released > 2 * self._kept_bytes:
            self._released = end - self._kept_bytes
            if _libc.fallocate(self.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, self._released) != 0:
                os.ftruncate(self.file, 0)  # the file system can't do it
                self._released = 0


class EnvironmentFolder:
    """The folder `/tmp/python_env_*` of one tritonserver, which it leaves behind when it is killed.

    Nothing in or on it tells whose it is. But it appears after tritonserver's start and before its first model's.
    Where another one appears at the same time, both are left alone.

    Args:
        record: File for its path.
    """

    def __init__(self, record: Path) -> None:
        self._record = record
        self._others: set[Path] | None = self._present()
        self._give_up_s = time.monotonic() + FIRST_MODEL_TIMEOUT_S

    def find(self, server_pid: int) -> None:
        """Note the folder down once it is there, and a model has been started."""
        if self._others is None:
            return
        if time.monotonic() >= self._give_up_s:
            self._others = None
        elif _has_children(server_pid):
            new = [path for path in self._present() - self._others if owns(path)]
            self._others = None
            if len(new) == 1:
                self._record.write_text(str(new[0]))

    @staticmethod
    def _present() -> set[Path]:
        return set(TRITON_TEMPORARY_FOLDER.glob(ENVIRONMENT_FOLDERS))


def remove_environment_folder(workspace: Path) -> None:
    """Remove the folder that the Python backend of a dead tritonserver has left, if it was noted down."""
    try:
        folder = Path((workspace / ENVIRONMENT_FOLDER_FILE).read_text())
    except (OSError, UnicodeDecodeError):
        return
    if folder.parent == TRITON_TEMPORARY_FOLDER and folder.match(ENVIRONMENT_FOLDERS) and owns(folder):
        shutil.rmtree(folder, ignore_errors=True)


def owns(path: Path) -> bool:
    """Say whether something exists, and is this user's and no link."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode)


def remove_shared_memory(prefix: str, folder_pattern: str, server_pid: int) -> None:
    """Remove what a server that is dead has left in shared memory.

    Args:
        prefix: Of the names of the regions that Triton has made.
        folder_pattern: Of the names of the folders that its models have made, see `model_folders`.
        server_pid: The server's process id.
    """
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
    for folder in model_folders(folder_pattern, server_pid):
        shutil.rmtree(folder, ignore_errors=True)


def end_requests(folder_pattern: str, server_pid: int) -> None:
    """Tell the models of a server that requests which still run are to be answered now, with UNAVAILABLE.

    They look whether there is a file `stop` in the folder that they share.
    """
    for folder in model_folders(folder_pattern, server_pid):
        with contextlib.suppress(OSError):
            (folder / STOP_FILE).touch(mode=0o600)


def model_folders(pattern: str, server_pid: int) -> list[Path]:
    """Return the folders in shared memory that the models of a server have made.

    Args:
        pattern: Of their names; `{namespace}` and `{pid}` stand for the namespace of process ids and the server's id.
            Empty for none.
        server_pid: The server's process id.
    """
    namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    pattern = pattern.replace("{namespace}", namespace).replace("{pid}", str(server_pid))
    return [path for path in SHARED_MEMORY.glob(pattern) if owns(path)] if server_pid and pattern else []


def _has_children(pid: int) -> bool:
    try:
        return any(task.joinpath("children").read_bytes() for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return False


def _prepare_child() -> None:
    die_with_parent()
    _keep_umask()


def die_with_parent() -> None:
    """Have this process killed when the thread that started it ends; for `preexec_fn`."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


class _FilterInstruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_FilterInstruction)))


# fchmod(file, 0644) succeeds and does nothing, in x86-64's numbers; see seccomp(2). Offsets: those of `seccomp_data`.
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_FCHMOD_FILTER = (
    (_LOAD_WORD, 0, 0, 4),  # architecture
    (_JUMP_IF_EQUAL, 0, 5, 0xC000003E),
    (_LOAD_WORD, 0, 0, 0),  # system call
    (_JUMP_IF_EQUAL, 0, 3, 91),
    (_LOAD_WORD, 0, 0, 24),  # second argument
    (_JUMP_IF_EQUAL, 0, 1, 0o644),
    (_RETURN, 0, 0, 0x00050000),  # errno 0
    (_RETURN, 0, 0, 0x7FFF0000),  # allow
)
_FCHMOD_PROGRAM = _FilterProgram(
    len(_FCHMOD_FILTER), (_FilterInstruction * len(_FCHMOD_FILTER))(*(_FilterInstruction(*f) for f in _FCHMOD_FILTER))
)
_SYS_SECCOMP, _SET_MODE_FILTER, _FLAG_SPEC_ALLOW = 317, 1, 4


def _keep_umask() -> None:
    """Make shared memory obey the umask in this process and its children.

    Triton's Python backend (boost) makes each region and gives it the mode 0644 with fchmod, whatever the umask is. A
    later chmod wouldn't do: who has opened the region by then can read it for ever.
    """
    _prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if _libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _FLAG_SPEC_ALLOW, ctypes.byref(_FCHMOD_PROGRAM)) != 0:
        os.write(sys.stderr.fileno(), UNPROTECTED.encode())


def _reap_orphans() -> None:
    """Wait for killed Python models, so that no process outlives us."""
    deadline = time.monotonic() + ORPHANS_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(POLL_S)


def _report(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # The runner is gone; cleaning up is what remains.
        os.write(sys.stdout.fileno(), f"{line}\n".encode())


def main() -> None:
    """Run the command line that `server.embedded` builds."""
    parser = argparse.ArgumentParser(prog="server/supervisor.py", description="Internal: see server/embedded.py.")
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--shared-memory-prefix", required=True)
    parser.add_argument("--shared-memory-folders", required=True)
    parser.add_argument("--drain-timeout-s", type=float, required=True)
    parser.add_argument("--stop-timeout-s", type=float, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    os.umask(PRIVATE_UMASK)
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        supervisor = Supervisor(options)
        signal.signal(signal.SIGTERM, supervisor.stop)
        signal.signal(signal.SIGINT, supervisor.stop)
        _report(f"started {supervisor.pid}")
        status = supervisor.run()
        remove_shared_memory(options.shared_memory_prefix, options.shared_memory_folders, supervisor.pid)
        _report(f"ended {status}")
        supervisor.wait_for_runner()
    finally:
        remove_environment_folder(options.workspace)
        shutil.rmtree(options.workspace, ignore_errors=True)


if __name__ == "__main__":
    main()
