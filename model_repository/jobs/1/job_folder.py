"""The private folder in shared memory where the Python models of one server meet, and those that dead servers left.

Its name says whose it is: the namespace of process ids (containers may share the memory and not the ids), the server's
process id and when that process started (ids are used again), and the model.
"""

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, not a temporary file of ours
NAME = "audioldm2_jobs"


def folder_of(model: str, server_pid: int) -> Path:
    """Return where the board of the model `model` of a running server is."""
    return SHARED_MEMORY / f"{_of_server(server_pid)}{model}"


def folders_of(server_pid: int) -> list[Path]:
    """Return the boards that a running server has, one for each of its ensembles."""
    return sorted(SHARED_MEMORY.glob(f"{_of_server(server_pid)}*"))


@contextlib.contextmanager
def private_folder(path: Path, *, make: bool = False) -> Iterator[int]:
    """Open a folder that belongs to this user alone; gives its descriptor, for use as `dir_fd`.

    Args:
        path: A symbolic link there isn't followed.
        make: Make the folder if there is none.

    Raises:
        OSError: There is none, it can't be made, or others have a part in it.
    """
    if make:
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        status = os.fstat(folder)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(f"{path} isn't this user's alone: remove it")
        yield folder
    finally:
        os.close(folder)


def remove_folders_of_dead_servers() -> None:
    """Remove this user's folders whose servers have ended without removing them."""
    for path in SHARED_MEMORY.glob(f"{_prefix()}*"):
        owner = re.match(r"(\d+)_(\d+)_", path.name.removeprefix(_prefix()))
        if owner and _start_time(int(owner[1])) != owner[2] and _is_ours(path):
            shutil.rmtree(path, ignore_errors=True)


def _of_server(server_pid: int) -> str:
    return f"{_prefix()}{server_pid}_{_start_time(server_pid)}_"


def _prefix() -> str:
    return f"{NAME}_{Path('/proc/self/ns/pid').stat().st_ino}_"


def _start_time(pid: int) -> str:
    """Return when a process started, in the kernel's ticks since boot; an empty string if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _is_ours(path: Path) -> bool:
    try:
        return path.lstat().st_uid == os.geteuid()
    except FileNotFoundError:  # another server has just removed it
        return False
