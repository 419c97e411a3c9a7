"""tritonserver as seen by the runner: a process group behind a supervisor, a log, and two one-way pipes."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from server.errors import ServerError
from server.leftovers import remove_workspace
from server.supervisor import KEPT_LOG_BYTES, remove_shared_memory

SUPERVISOR = Path(__file__).resolve().with_name("supervisor.py")
START_TIMEOUT_S = 30.0
CLEANUP_TIMEOUT_S = 15.0
KILL_MARGIN_S = 10.0
ANSWER_MARGIN_S = 2.0
"""So long before tritonserver cuts its callers off at the latest, its models are told to answer what still runs."""


class SupervisedProcess:
    """tritonserver under its supervisor (see `server/supervisor.py`, which has the protocol).

    Attributes:
        pid: tritonserver's process id.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        current_directory: Path,
        workspace: Path,
        log: Path,
        shared_memory_prefix: str,
        shared_memory_folders: str,
        stop_timeout_s: float,
    ) -> None:
        self._stop_timeout_s = stop_timeout_s + KILL_MARGIN_S
        self._reports = b""
        self._log = log.open("rb")
        self._log_offset = 0
        self._workspace = workspace
        self._shared_memory_prefix, self._shared_memory_folders = shared_memory_prefix, shared_memory_folders
        self._supervisor = subprocess.Popen(
            [
                *(sys.executable, "-I", "-S", str(SUPERVISOR)),
                *("--workspace", str(workspace), "--log", str(log)),
                *("--shared-memory-prefix", shared_memory_prefix),
                *("--shared-memory-folders", shared_memory_folders),
                *("--drain-timeout-s", str(max(stop_timeout_s - ANSWER_MARGIN_S, stop_timeout_s / 2))),
                *("--stop-timeout-s", str(self._stop_timeout_s), "--", *command),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=current_directory,
            env=dict(environment),
            start_new_session=True,
        )
        self.pid = 0
        try:
            self.pid = int(self._wait_for_report("started", START_TIMEOUT_S) or 0)
            if not self.pid:
                raise ServerError(f"{command[0]} could not be started, for the reason above.")
        except BaseException:
            self.close()
            raise

    def exit_status(self) -> int | None:
        """Tritonserver's exit status, minus the number of the signal that ended it, or None while it runs."""
        status = self._wait_for_report("ended", 0.0)
        if status is not None:
            return int(status)
        return -9 if self._supervisor.poll() is not None else None

    def stop(self) -> None:
        """Ask tritonserver to finish its requests and end, within the stop timeout; return when it has."""
        self._order(b"stop")
        if self._wait_for_report("ended", self._stop_timeout_s + CLEANUP_TIMEOUT_S) is None:
            self.kill()

    def kill(self) -> None:
        """End tritonserver and its Python models at once; doesn't wait. May be called from a signal handler."""
        self._order(b"kill")

    def close(self) -> None:
        """Kill what still runs and wait for the clean-up: no process, no shared memory, no temporary folder."""
        for pipe in (self._supervisor.stdin, self._supervisor.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        try:
            self._supervisor.wait(CLEANUP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._supervisor.kill()
            self._supervisor.wait()
        finally:
            self._log.close()
        if self._supervisor.returncode != 0:
            self._clean_up_for_supervisor()

    def _clean_up_for_supervisor(self) -> None:
        """Do what the supervisor would have done, had it not been killed; tritonserver was killed with it."""
        with contextlib.suppress(ProcessLookupError):
            if self.pid:
                os.killpg(self.pid, signal.SIGKILL)
        remove_shared_memory(self._shared_memory_prefix, self._shared_memory_folders, self.pid)
        remove_workspace(self._workspace)

    def log_text(self) -> str:
        """Tritonserver's output so far; of a very long one the last megabytes."""
        return self._read_log(0)[1].decode(errors="replace")

    def new_log_lines(self) -> str:
        """The complete lines of output that came since the last call; of very much the last megabytes."""
        start, block = self._read_log(self._log_offset)
        lines = block[: block.rfind(b"\n") + 1]
        self._log_offset = start + len(lines)
        return lines.decode(errors="replace")

    def _read_log(self, start: int) -> tuple[int, bytes]:
        """Read from a position to the end.

        Returns:
            The position that was read from, and what is there. It is a later one where the supervisor may have released
            what lies before, and an earlier one where it had to empty the file.
        """
        end = os.fstat(self._log.fileno()).st_size
        start = start if start <= end else 0
        if end - start <= KEPT_LOG_BYTES:
            return start, os.pread(self._log.fileno(), end - start, start)
        block = os.pread(self._log.fileno(), KEPT_LOG_BYTES, end - KEPT_LOG_BYTES)
        lines = block[block.find(b"\n") + 1 :]  # the first one is incomplete
        return end - len(lines), lines

    def _order(self, word: bytes) -> None:
        stdin = self._supervisor.stdin
        if stdin is not None and not stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                os.write(stdin.fileno(), word + b"\n")

    def _wait_for_report(self, word: str, timeout_s: float) -> str | None:
        """Return what the supervisor said after `word`, or None if it hasn't said it in time or has died."""
        deadline = time.monotonic() + timeout_s
        while True:
            for line in self._reports.decode().splitlines():
                if line.startswith(f"{word} "):
                    return line.removeprefix(f"{word} ")
            if not self._read_reports(max(0.0, deadline - time.monotonic())):
                return None

    def _read_reports(self, timeout_s: float) -> bool:
        """Read from the supervisor; False if nothing came, because the time is up or because it has gone."""
        stdout = self._supervisor.stdout
        if stdout is None or stdout.closed or not select.select([stdout], [], [], timeout_s)[0]:
            return False
        block = os.read(stdout.fileno(), 4096)
        self._reports += block
        return bool(block)
