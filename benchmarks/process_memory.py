"""Memory of a process and all that it has started, sampled by a thread."""

import re
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

SAMPLE_S = 0.1
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
        sizes = {pid: _pss_mib(pid) for pid in _tree(self._pid)}
        for pid, size in sizes.items():
            name = _name(pid)
            self.peak_of[name] = max(self.peak_of.get(name, 0.0), size)
        self.peak = max(self.peak, sum(sizes.values()))
        return sum(sizes.values())

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.now()


def _tree(pid: int) -> list[int]:
    try:
        children = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in _words(path)]
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in _tree(child))]


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:  # the thread has ended
        return []


def _pss_mib(pid: int) -> float:
    try:
        found = _PSS.search(Path(f"/proc/{pid}/smaps_rollup").read_bytes())
    except OSError:  # the process has ended
        return 0.0
    return int(found.group(1)) / 1024 if found else 0.0


def _name(pid: int) -> str:
    """Return the Triton model that a process serves, or the name of its program."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return "ended"
    for word in words:
        if word.endswith(b".py") and word.startswith(b"/"):
            return _model(Path(word.decode()), words)
    return Path(words[0].decode()).name


def _model(script: Path, words: list[bytes]) -> str:
    """Return the model's name: the folder above the script's version folder, or, for a shared backend, an argument."""
    if script.parent.name.isdecimal():
        return script.parent.parent.name
    return b" ".join(words).decode().rpartition("/")[2] or script.parent.name
