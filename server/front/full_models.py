"""Which ensembles have no room, as their tokenizers say in the folders that the models of a server share.

A request that is refused here never reaches Triton: under overload a request costs the machine a third less.
"""

import time
from collections.abc import Iterable
from pathlib import Path

FULL_FILE = "full."
"""And the ensemble's name (`model_repository/jobs/1/job_board.py`)."""
HOLDS_S = 0.5
"""It is written twice as often, as long as there is no room: a tokenizer that has died refuses nobody."""
MOST_BYTES = 400


class FullModels:
    """Looks at a file for each request; about two microseconds where there is none."""

    def __init__(self) -> None:
        self._folders: tuple[Path, ...] = ()
        self._freed_s = 0.0

    def set_folders(self, folders: Iterable[Path]) -> None:
        """Say where the models of the present server write."""
        self._folders = tuple(folders)

    def note_freed(self) -> None:
        """Say that a request that was let in has ended: there may be room, whatever was written before."""
        self._freed_s = time.time()

    def why_full(self, model: str) -> str:
        """Return a sentence where there is no room for requests of `model`; an empty text otherwise."""
        for folder in self._folders:
            path = folder / f"{FULL_FILE}{model}"
            try:
                written_s = path.stat().st_mtime
                if written_s > self._freed_s and abs(time.time() - written_s) < HOLDS_S:
                    return path.read_bytes()[:MOST_BYTES].decode(errors="replace")
            except OSError:
                continue
        return ""
