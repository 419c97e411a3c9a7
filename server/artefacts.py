"""Checks at the start that a model repository's files are those that the export wrote (`export/inspection.py`)."""

from collections.abc import Iterable
from pathlib import Path

from export.inspection import QUICK_SUM_BYTES, inspect
from server.errors import ServerError


def check_artefacts(directory: Path, missing: Iterable[str]) -> None:
    """Check sizes, headers of weights, and the sums of the small files of a model repository; takes under a second.

    Args:
        directory: The repository.
        missing: Paths in it that are known to be missing.

    Raises:
        ServerError: A file is damaged or missing; the sentence names it and the command that repairs it.
        OSError: Something can't be read.
    """
    if sentences := inspect(directory, QUICK_SUM_BYTES, missing).damage_sentences():
        raise ServerError(" ".join(sentences))


def artefact_warnings(directory: Path) -> list[str]:
    """Return a sentence for each ensemble that can't be compared with what was exported, for want of a manifest."""
    try:
        return inspect(directory, sum_bytes=0).warning_sentences()
    except OSError:
        return []  # the start says what is wrong
