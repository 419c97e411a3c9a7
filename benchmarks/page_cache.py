"""Files that must come from the disk again."""

import os
from pathlib import Path


def forget(folder: Path) -> None:
    """Drop the files of a folder from the kernel's page cache, so that they are read from the disk again."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # what isn't written yet would stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
