"""Memory of a process and all that it has started, sampled by a thread."""

import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from server.stubs import stub_of

SAMPLE_S = 0.1
_MODULES = {b"server": "runner", b"server.front": "door"}
_PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)


class TreeMemory:
    """The highest memory of a process tree while it is entered, in MiB.

    What processes share counts once: the unit is the kernel's proportional set size.

    Attributes:
        peak: Of all processes together.
        peak_of: Of each process alone, by what it serves.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak = 0.0
        self.peak_of: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def now(self) -> float:
        """Return the present memory of all processes together, in MiB."""
        sizes = {pid: pss_mib(pid) for pid in process_tree(self._pid)}
        for pid, size in sizes.items():
            name = process_name(pid)
            self.peak_of[name] = max(self.peak_of.get(name, 0.0), size)
        self.peak = max(self.peak, sum(sizes.values()))
        return sum(sizes.values())

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.now()


def process_tree(pid: int) -> list[int]:
    """Return a process and all that it has started and that lives, the first one first."""
    try:
        children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in _words(path)]
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in process_tree(child))]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # the thread has ended
        return []


def pss_mib(pid: int) -> float:
    """Return the proportional set size of a process in MiB; 0 if it has ended."""
    try:
        found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
    except OSError:  # the process has ended
        return 0.0
    return int(found.group(1)) / 1024 if found else 0.0


def process_name(pid: int) -> str:
    """Return the Triton model that a process serves, the part of the server that it is, or the name of its program."""
    if (stub := stub_of(pid)) and stub.model:
        return stub.model
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "ended"
    if b"-m" in words[:-1] and (module := words[words.index(b"-m") + 1]) in _MODULES:
        return _MODULES[module]
    scripts = (Path(word.decode()).stem for word in words if word.startswith(b"/") and word.endswith(b".py"))
    return next(scripts, Path(words[0].decode()).name)
