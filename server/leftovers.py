"""What servers have left that were killed together with the processes that clean up after them.

Temporary folders and shared memory outlive processes. Whose they are stands in their names or in a file in them, as a
tag: the namespace of process ids (containers may share folders and not the ids), the owner's process id, and when it
started (ids are used again). What another user owns, or a process that lives, or one in another namespace, stays.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from server.stubs import is_alive, start_time
from server.supervisor import SHARED_MEMORY, owns, remove_environment_folder

WORKSPACE_PREFIX = "embedded-triton-"
OWNER_FILE = "owner"

REGION_PREFIX = "triton_python_backend_shm_region_"
"""What newer Tritons' Python backend calls its shared memory; they keep clients away from such names."""
JOB_BOARD_PREFIX = "audioldm2_jobs_"

_TAG = re.compile(r"(?P<namespace>\d+)_(?P<pid>\d+)_(?P<start>\d*)(?=_|$)")


def owner_tag(pid: int | None = None) -> str:
    """Return the tag of a process; by default this one."""
    pid = pid or os.getpid()
    return f"{_namespace()}_{pid}_{start_time(pid)}"


def region_prefix() -> str:
    """Return how the names of the shared memory of a new server of this process begin."""
    return f"{REGION_PREFIX}{owner_tag()}_{secrets.token_hex(4)}_"


def remove_leftovers(temporary_folders: Iterable[Path]) -> None:
    """Remove this user's workspaces, shared memory and job boards whose owners are dead.

    Args:
        temporary_folders: Where workspaces may be.
    """
    for folder in {folder.absolute() for folder in temporary_folders}:
        for workspace in folder.glob(f"{WORKSPACE_PREFIX}*"):
            if owns(workspace) and _is_dead(_owner_of(workspace)):
                remove_workspace(workspace)
    for prefix in (REGION_PREFIX, JOB_BOARD_PREFIX):
        for path in SHARED_MEMORY.glob(f"{prefix}*"):
            if owns(path) and _is_dead(path.name.removeprefix(prefix)):
                _remove(path)


def remove_workspace(workspace: Path) -> None:
    """Remove a workspace, and the folder that tritonserver made elsewhere."""
    remove_environment_folder(workspace)
    shutil.rmtree(workspace, ignore_errors=True)


def _owner_of(workspace: Path) -> str:
    try:
        return (workspace / OWNER_FILE).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):  # it is only being made
        return ""


def _is_dead(tag: str) -> bool:
    """Say whether it is sure that the owner has ended."""
    owner = _TAG.match(tag)
    if not owner or owner["namespace"] != _namespace():
        return False
    pid = int(owner["pid"])
    return not is_alive(pid) or start_time(pid) != owner["start"]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _namespace() -> str:
    return str(Path("/proc/self/ns/pid").stat().st_ino)
