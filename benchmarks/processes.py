"""What each process of a server has and has used: memory, processor time, open files, threads."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process_memory import process_name, process_tree, pss_mib

_FIELD = re.compile(r"^(VmRSS|VmHWM|Threads):\s+(\d+)", re.MULTILINE)
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_RESET_PEAK = "5"  # proc_pid_clear_refs(5)


@dataclass(frozen=True)
class ProcessLook:
    """One process at one moment.

    Attributes:
        pid: Its process id.
        rss_mib: Resident memory, what is shared included.
        peak_rss_mib: The most it was since `reset_peaks`, by the kernel's count.
        pss_mib: The kernel's proportional set size: what is shared is divided among those who share it.
        cpu_s: Processor time so far, in user and in kernel mode.
        files: Open descriptors.
        threads: How many it has.
    """

    pid: int
    rss_mib: float
    peak_rss_mib: float
    pss_mib: float
    cpu_s: float
    files: int
    threads: int


def look_at(pid: int, *, with_pss: bool = True) -> dict[str, ProcessLook]:
    """Return a look at a process and all that it has started, by name; those that end in this moment are left out.

    Args:
        pid: The first of them.
        with_pss: Whether to read the proportional set size, which takes the kernel milliseconds for each.
    """
    looks: dict[str, ProcessLook] = {}
    for found in process_tree(pid):
        try:
            look = _look(found, with_pss)
        except OSError:
            continue
        name = process_name(found)
        looks[name if name not in looks else f"{name} {found}"] = look
    return looks


def reset_peaks(pid: int) -> None:
    """Let `peak_rss_mib` of a process and all that it has started count from now on."""
    for found in process_tree(pid):
        Path(f"/proc/{found}/clear_refs").write_text(_RESET_PEAK)


def folders_of(pid: int) -> set[Path]:
    """Return the private folders of a server: its workspace, and where its sockets are."""
    options = {b"--workspace", b"--folder"}
    folders = set()
    for found in process_tree(pid):
        words = [part for word in _command(found) for part in word.split(b"=", 1)]
        folders |= {Path(os.fsdecode(words[i + 1])) for i, word in enumerate(words[:-1]) if word in options}
    return folders


def files_of(pid: int) -> Iterator[Path]:
    """Yield all files of a server in its private folders and in shared memory, but for entries of the job board."""
    for folder in folders_of(pid):
        yield from folder.rglob("*")
    owners = {f"_{found}_" for found in process_tree(pid)} | {f"_{os.getpid()}_"}
    for path in Path("/dev/shm").iterdir():  # noqa: S108 - where Linux keeps POSIX shared memory
        if any(owner in path.name for owner in owners):
            yield path


def board_entries(pid: int) -> int:
    """Return how many entries the job boards of a server have; those of requests that are over stay for a minute."""
    boards = [path for path in files_of(pid) if path.name.startswith("audioldm2_jobs_")]
    return sum(len(list(board.iterdir())) for board in boards)


def _look(pid: int, with_pss: bool) -> ProcessLook:
    folder = Path(f"/proc/{pid}")
    fields = {name: int(value) for name, value in _FIELD.findall((folder / "status").read_text())}
    times = (folder / "stat").read_text().rpartition(")")[2].split()
    return ProcessLook(
        pid=pid,
        rss_mib=fields["VmRSS"] / 1024,
        peak_rss_mib=fields["VmHWM"] / 1024,
        pss_mib=pss_mib(pid) if with_pss else 0.0,
        cpu_s=(int(times[11]) + int(times[12])) / _CLOCK_TICKS,
        files=len(list((folder / "fd").iterdir())),
        threads=fields["Threads"],
    )


def _command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
