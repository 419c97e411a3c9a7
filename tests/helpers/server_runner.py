"""`python -m server` in a process of its own, and the processes that it starts."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers import tiny_repository as tiny

END_TIMEOUT_S = 20


class Runner:
    """`python -m server` in a process of its own, with a temporary folder of its own."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self.repository = directory / "repository"
        self.temporary = directory / "temporary"
        self.temporary.mkdir()
        self.stderr = directory / "stderr"
        environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
        ports = [item for name in ("http", "grpc", "metrics") for item in (f"--{name}-port", "0")]
        with self.stderr.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "server", "--model-repository", str(self.repository), *ports, *arguments],
                cwd=tiny.ROOT,
                env={**environment, "TMPDIR": str(self.temporary)},
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def wait_until_ready(self) -> str:
        """Return the line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def pid_of(self, name: str) -> int:
        """Process id of the one process of ours that runs a program of that name."""
        [pid] = [pid for pid in tiny.processes_of(self.repository) if program_of(pid) == name]
        return pid

    def supervisor_pid(self) -> int:
        """Process id of its supervisor."""
        [pid] = [pid for pid, line in tiny.processes_of(self.temporary).items() if "supervisor.py" in line]
        return pid

    def end(self) -> int:
        """Wait for its end, and return its exit status."""
        assert self.process.stdout is not None
        status = self.process.wait(END_TIMEOUT_S)
        self.process.stdout.close()
        return status

    def environment_folders(self) -> list[Path]:
        """Return the folder in /tmp that tritonserver has made; none where another one appeared at the same time."""
        return [Path(record.read_text()) for record in self.temporary.glob("embedded-triton-*/python_env")]

    def traces(self) -> list[str]:
        """Return all that is left of it: processes, temporary folders, shared memory."""
        left = [*self.temporary.iterdir(), *tiny.processes_of(self.repository.parent).values(), *self.children()]
        return [*map(str, left), *tiny.shared_memory_of(self.process.pid)]

    def children(self) -> list[str]:
        """Return the processes that have its environment, itself not."""
        variable = f"TMPDIR={self.temporary}\0".encode()
        return [f"{pid} {program_of(pid)}" for pid in processes() if pid != self.process.pid and has(pid, variable)]

    def job_boards(self) -> list[Path]:
        """The folders that the model `jobs` has made in shared memory."""
        return list(tiny.SHARED_MEMORY.glob(f"audioldm2_jobs_*_{self.pid_of('tritonserver')}_*"))


def processes() -> list[int]:
    """All process ids."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def has(pid: int, variable: bytes) -> bool:
    """Whether a process has an environment variable, which ends with a NUL."""
    try:
        return variable in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def program_of(pid: int) -> str:
    """Name of the program that a process runs; empty where it has ended."""
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
