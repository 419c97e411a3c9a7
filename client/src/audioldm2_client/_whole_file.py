"""Files that appear whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART_PATTERN = ".*.part"
"""What a process that was killed may leave behind."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what is written there gets the name `path` if no exception comes.

    It is on the disk before it gets the name, so that a power failure can't leave half of it either.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path: Path) -> None:
    """Find out before the work whether a file can be written at `path`.

    Raises:
        OSError: the folder doesn't exist or can't be written to, or `path` is a folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {str(path.parent)!r} doesn't exist; create it first")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"folder {str(path.parent)!r} isn't writable")
