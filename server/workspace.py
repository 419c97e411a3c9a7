"""The temporary folder that one embedded server lives in."""

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError
from server.installation import Installation, python_command_directory

BACKENDS = Path(__file__).resolve().parent / "backends"


@dataclass(frozen=True)
class Workspace:
    """A temporary folder, private to this user.

    Attributes:
        root: The folder itself; whoever made it removes it.
        backends: For `--backend-directory`: Triton's Python backend with its stub, and this project's own backends.
        current_directory: Empty; tritonserver runs in it, because every stub has its current directory on `sys.path`.
        command_directory: Goes first on PATH, so that the stub's `python3` is this interpreter.
        log: tritonserver's output, that of its Python models included.
    """

    root: Path
    backends: Path
    current_directory: Path
    command_directory: Path
    log: Path


def create_workspace(installation: Installation) -> Workspace:
    """Make the folder and put everything into it.

    Raises:
        ServerError: No `python3` command can be provided for the stub, or the temporary folder is not writable.
    """
    try:
        root = Path(tempfile.mkdtemp(prefix="embedded-triton-"))
    except OSError as error:
        raise ServerError(f"No temporary folder can be made ({error}); set TMPDIR to a writable one.") from error
    try:
        return _fill(root, installation)
    except BaseException:
        shutil.rmtree(root, ignore_errors=True)
        raise


def _fill(root: Path, installation: Installation) -> Workspace:
    workspace = Workspace(
        root=root,
        backends=root / "backends",
        current_directory=root / "cwd",
        command_directory=python_command_directory() or root / "bin",
        log=root / "tritonserver.log",
    )
    workspace.current_directory.mkdir()
    workspace.log.touch(mode=0o600)
    _link_backends(workspace.backends, installation)
    if workspace.command_directory.parent == root:
        _link_python(workspace.command_directory)
    return workspace


def _link_backends(directory: Path, installation: Installation) -> None:
    python = directory / "python"
    python.mkdir(parents=True)
    for file in (
        installation.python_backend_library,
        installation.python_backend_utils,
        installation.python_backend_stub,
    ):
        shutil.copy2(file, python)  # Not a link: Triton refuses a library that lies outside the backend directory.
    for backend in BACKENDS.iterdir():
        if (backend / "model.py").is_file():
            (directory / backend.name).symlink_to(backend)


def _link_python(directory: Path) -> None:
    """Provide `python3` for a Python whose own folder has no such command, e.g. only `python3.11`."""
    if sys.prefix != sys.base_prefix:
        raise ServerError(
            f"The virtual environment {sys.prefix} has no bin/python3, which Triton's Python models are started with: "
            f"make it anew with `python3 -m venv`."
        )
    directory.mkdir()
    (directory / "python3").symlink_to(Path(sys.executable).resolve())
