"""Look at the processes of a running Triton: tritonserver, and the stub that hosts each Python model.

Everything is read from `/proc`, with the standard library alone: `server/probe.py` uses it inside of containers.

A stub (Triton 2.51 to 2.73) has a thread of Triton's own that sleeps for 300 ms, says in shared memory that the stub is
healthy, and sleeps again. It needs neither Python's lock nor more than microseconds, so it runs while the model
computes. Where tritonserver waits for an answer, it looks every second whether the stub has said so.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

STUB_PROGRAM = "triton_python_backend_stub"
SERVER_PROGRAM = "tritonserver"
HEARTBEAT_S = 0.3
"""How often the thread of a stub says that it is healthy."""

STOPPED_STATES = ("T", "t")
DEAD_STATES = ("", "Z", "X")

_NAME_LENGTH = 15  # of a process in /proc, which is all that a dead one still has
_STATUS = re.compile(
    rb"^State:\t(\w).*^voluntary_ctxt_switches:\t(\d+)\nnonvoluntary_ctxt_switches:\t(\d+)", re.MULTILINE | re.DOTALL
)
_STATE = re.compile(rb"^State:\t(\w)", re.MULTILINE)
_INSTANCE = re.compile(r"(_\d+)?_\d+(_gpu\d+)?$")


@dataclass(frozen=True)
class Stub:
    """The process of one instance of a Python model.

    Attributes:
        pid: Its process id.
        model: The model's name; empty where the process is dead, and Triton hasn't collected its exit status.
    """

    pid: int
    model: str


@dataclass(frozen=True)
class ThreadLook:
    """What a thread is doing.

    Attributes:
        state: The letter of `State:` in proc(5); empty where the thread is gone.
        switches: How often it has been taken off a processor since its start, which rises whenever it runs and waits
            again; None where the kernel doesn't tell.
    """

    state: str
    switches: int | None = None


class Thread:
    """A thread that is looked at again and again; it is a context manager, which closes it.

    Its file in `/proc` stays open: another process that gets the same id later is never taken for this one.

    Raises:
        OSError: There is no such thread.
    """

    def __init__(self, pid: int, tid: int) -> None:
        self._file = os.open(f"/proc/{pid}/task/{tid}/status", os.O_RDONLY | os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def look(self) -> ThreadLook:
        """Return what the thread is doing now."""
        try:
            status = os.pread(self._file, 8192, 0)
        except ProcessLookupError:
            return ThreadLook("")
        if match := _STATUS.search(status):
            return ThreadLook(match[1].decode(), int(match[2]) + int(match[3]))
        state = _STATE.search(status)
        return ThreadLook(state[1].decode() if state else "")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def thread_ids(pid: int) -> list[int]:
    """Return the threads of a process in the order of their start; none if the process is gone.

    A stub's second one is that which says every 300 ms that it is healthy.
    """
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]  # noqa: PTH208 - see below
    except OSError:
        return []


def switches_of_all_threads(pid: int) -> int | None:
    """Return how often the threads of a process have run together; None if it is gone, or the kernel doesn't tell."""
    found = None
    for tid in thread_ids(pid):
        try:
            with Thread(pid, tid) as thread:
                switches = thread.look().switches
        except OSError:
            continue
        if switches is not None:
            found = (found or 0) + switches
    return found


def ending_signal(pid: int) -> int:
    """Return the number of the signal that a dead process was ended by; 0 if it ended itself, or nobody knows."""
    return int(fields[-1]) & 0x7F if (fields := _stat(pid)) else 0


def start_time(pid: int) -> str:
    """Return when a process started, in the kernel's ticks since boot; an empty string if there is none."""
    return fields[19] if (fields := _stat(pid)) else ""


def parent_of(pid: int) -> int:
    """Return the process id of a process's parent; 0 if the process is gone."""
    return int(fields[1]) if (fields := _stat(pid)) else 0


def find_servers() -> list[int]:
    """Return the process ids of all tritonservers that can be seen from here and live."""
    return [pid for pid in process_ids() if name_of(pid) == SERVER_PROGRAM and is_alive(pid)]


def find_stubs(server_pid: int) -> list[Stub]:
    """Return the stubs of a tritonserver, dead ones included that it hasn't collected."""
    children = (pid for pid in process_ids() if parent_of(pid) == server_pid)
    return [stub for pid in children if (stub := stub_of(pid))]


def stub_of(pid: int) -> Stub | None:
    """Return the stub that a process is; None if it is something else, or not yet a stub."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    if Path(command[0]).name == STUB_PROGRAM and len(command) > 1:
        return Stub(pid, _model_name(command))
    is_dead_stub = name_of(pid) == STUB_PROGRAM[:_NAME_LENGTH] and not is_alive(pid)
    return Stub(pid, "") if is_dead_stub else None


def is_alive(pid: int) -> bool:
    """Say whether a process exists and hasn't ended."""
    return (fields := _stat(pid)) is not None and fields[0] not in DEAD_STATES


def process_ids() -> Iterator[int]:
    """Yield the ids of all processes that can be seen."""
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208 - twice as fast


def name_of(pid: int) -> str:
    """Return the first 15 characters of the name of a process's program; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""


def _model_name(command: list[str]) -> str:
    """Return a model's name from its stub's command line: `.../unet/1/model.py`, ..., and, eighth, `unet_0_0`."""
    folder = Path(command[1]).parent.parent.name
    instance = command[8] if len(command) > 8 else ""
    return folder if not instance or instance.startswith(folder) else _INSTANCE.sub("", instance)


def _stat(pid: int) -> list[str] | None:
    """Return what follows the name in `/proc/PID/stat`: the state, the parent and so on, as in proc(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
