"""Ways in which a file of an exported repository gets damaged. None of them writes into a file that may be linked."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

Damage = Callable[[Path], None]


def linked_copy(repository: Path, copy: Path) -> Path:
    """Return a copy that takes no room: its files are hard links."""
    return Path(shutil.copytree(repository, copy, copy_function=os.link, ignore=shutil.ignore_patterns("__pycache__")))


def replace(path: Path, content: bytes) -> None:
    """Give a file a content of its own."""
    path.unlink()
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """Keep the first half, as a copy does that broke off."""
    content = path.read_bytes()
    replace(path, content[: len(content) // 2])


def empty(path: Path) -> None:
    """Leave no byte."""
    replace(path, b"")


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    replace(path, bytes(content))


def zero(path: Path) -> None:
    """Keep the size alone, as file systems do after a power failure."""
    replace(path, bytes(path.stat().st_size))


def grow(path: Path) -> None:
    """Append a byte."""
    replace(path, path.read_bytes() + b"\0")


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def make_folder(path: Path) -> None:
    """Put a folder in the place of the file."""
    path.unlink()
    path.mkdir()


def make_pipe(path: Path) -> None:
    """Put a pipe in the place of the file: reading it would wait for ever."""
    path.unlink()
    os.mkfifo(path)


def dangle(path: Path) -> None:
    """Put a link to nothing in the place of the file."""
    path.unlink()
    path.symlink_to("/nowhere/blobs/1234")


def make_pointer(path: Path) -> None:
    """Leave what Git LFS has in the place of a file that wasn't fetched."""
    replace(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 1234567\n")
