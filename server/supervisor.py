"""The process between the runner and tritonserver: whatever happens to either of them, it leaves nothing behind.

It is started as a script of its own and uses the standard library alone. It owns tritonserver (as its parent, and as
the reaper of tritonserver's orphans), and watches its own standard input:

- `stop`: end tritonserver with SIGTERM, and with SIGKILL when its time is up;
- `kill`: end it with SIGKILL at once;
- end of file: the runner has finished, or has died. Kill what still runs, remove the temporary folder and go.

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
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, not a temporary file of ours
POLL_S = 0.05
ORPHANS_TIMEOUT_S = 5.0

_prctl = ctypes.CDLL(None, use_errno=True).prctl


class Supervisor:
    """Runs one tritonserver until it ends or until it is told to end it."""

    def __init__(self, command: list[str], log: Path, stop_timeout_s: float) -> None:
        self._runner_pid = os.getppid()
        self._stop_timeout_s = stop_timeout_s
        self._kill_at: float | None = None
        self.runner_is_gone = False
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self.pid = self._child.pid

    def run(self) -> int:
        """Obey orders until tritonserver ends.

        Returns:
            Its exit status, or minus the number of the signal that ended it.
        """
        while self._child.poll() is None:
            self._obey(self._next_order())
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


def remove_shared_memory(prefix: str, folder_pattern: str, server_pid: int) -> None:
    """Remove what a server that is dead has left in shared memory.

    Args:
        prefix: Of the names of the regions that Triton has made.
        folder_pattern: Of the names of the folders that its models have made; `{namespace}` and `{pid}` stand for the
            namespace of process ids and the server's id. Empty for none.
        server_pid: The server's process id.
    """
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)
    namespace = str(Path("/proc/self/ns/pid").stat().st_ino)
    pattern = folder_pattern.replace("{namespace}", namespace).replace("{pid}", str(server_pid))
    for folder in SHARED_MEMORY.glob(pattern) if server_pid and pattern else ():
        shutil.rmtree(folder, ignore_errors=True)


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


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
    parser.add_argument("--stop-timeout-s", type=float, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    _prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        supervisor = Supervisor(options.command[1:], options.log, options.stop_timeout_s)
        signal.signal(signal.SIGTERM, supervisor.stop)
        signal.signal(signal.SIGINT, supervisor.stop)
        _report(f"started {supervisor.pid}")
        status = supervisor.run()
        remove_shared_memory(options.shared_memory_prefix, options.shared_memory_folders, supervisor.pid)
        _report(f"ended {status}")
        supervisor.wait_for_runner()
    finally:
        shutil.rmtree(options.workspace, ignore_errors=True)


if __name__ == "__main__":
    main()
