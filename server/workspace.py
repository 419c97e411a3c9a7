"""The temporary folder that one embedded server lives in.

Triton starts each Python model through a shell, with paths that it doesn't quote, in a Python that knows ASCII alone.
So all paths that Triton gets are plain: where another one is needed, a link in this folder stands for it.
"""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from server.errors import ServerError
from server.installation import PYTHON_VERSION, Installation, python_command_directory
from server.leftovers import OWNER_FILE, WORKSPACE_PREFIX, owner_tag, remove_leftovers

BACKENDS = Path(__file__).resolve().parent / "backends"

RANDOM_CHARACTERS = 8  # of `mkdtemp`

# What a shell takes as it is, without the colon, which separates paths.
_PLAIN = re.compile(r"[\w./+@%,=-]+", re.ASCII)
_OTHER_TEMPORARY_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - private folders are made in them


@dataclass(frozen=True)
class Workspace:
    """A temporary folder, private to this user.

    Attributes:
        root: The folder itself; the supervisor removes it.
        backends: For `--backend-directory`: Triton's Python backend with its stub, and this project's own backends.
        current_directory: Empty; tritonserver runs in it, because every stub has its current directory on `sys.path`.
        command_directory: Goes first on PATH, so that the stub's `python3` is this interpreter.
        log: tritonserver's output, that of its Python models included.
        links: Plain path of each link that was made, and what it stands for.
    """

    root: Path
    backends: Path
    current_directory: Path
    command_directory: Path
    log: Path
    links: dict[Path, Path] = field(default_factory=dict)

    def plain(self, path: Path) -> Path:
        """Return `path`, or a link to it where Triton couldn't take it as it is."""
        if is_plain(path):
            return path
        for link, target in self.links.items():
            if target == path:
                return link
        link = self.root / f"link{len(self.links)}"
        link.symlink_to(path)
        self.links[link] = path
        return link

    def home(self) -> dict[str, str]:
        """Return the variables of a user whom the system doesn't know, and whose home it therefore can't tell."""
        try:
            Path.home()
        except RuntimeError:
            return {"HOME": str(self.current_directory.parent), "USER": str(os.geteuid())}
        return {}


def is_plain(path: Path) -> bool:
    """Say whether Triton can take a path as it is."""
    return _PLAIN.fullmatch(str(path)) is not None


def readable(log: str, links: Mapping[Path, Path]) -> str:
    """Replace links in a log by what they stand for."""
    for link, target in links.items():
        log = log.replace(f"{link}/", f"{target}/")
    return log


def create_workspace(installation: Installation) -> Workspace:
    """Make the folder and put everything into it.

    Raises:
        ServerError: No `python3` command can be provided for the stub, or no temporary folder can be written to.
    """
    root = make_private_folder()
    try:
        return _fill(root, installation)
    except BaseException as error:
        shutil.rmtree(root, ignore_errors=True)
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise ServerError(
                f"The temporary folder {root.parent} can't be used ({reason}): set TMPDIR to another one."
            ) from error
        raise


def make_private_folder(longest_path: int | None = None) -> Path:
    """Make a folder in the first place that will do: TMPDIR, and then those that every Linux has.

    Args:
        longest_path: Characters that its path may have; None for any number.

    Raises:
        ServerError: None will.
    """
    try:
        first = Path(tempfile.gettempdir()).absolute()
    except OSError as error:
        raise ServerError(f"No temporary folder can be made ({error}); set TMPDIR to a writable one.") from error
    reasons = []
    parents = [first, *map(Path, _OTHER_TEMPORARY_FOLDERS)]
    remove_leftovers(parents)
    for parent in parents:
        try:
            _check_parent(parent, longest_path)
            root = Path(tempfile.mkdtemp(prefix=WORKSPACE_PREFIX, dir=parent))
            (root / OWNER_FILE).write_text(owner_tag(), encoding="ascii")
            return root
        except OSError as error:
            reasons.append(f"{parent}: {error.strerror or error}")
    raise ServerError(f"No temporary folder can be made ({'; '.join(reasons)}): set TMPDIR to one where it can.")


def _check_parent(folder: Path, longest_path: int | None) -> None:
    """Raise OSError unless Triton can start programs in a folder of `folder`."""
    if not is_plain(folder):
        raise OSError("its path has more than ASCII letters, digits and ./+@%,=_-")
    if longest_path is not None and len(str(folder / WORKSPACE_PREFIX)) + RANDOM_CHARACTERS > longest_path:
        raise OSError(f"paths in it have more than {longest_path} characters, too many for a socket's")
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError("programs can't run in it, it is mounted noexec")


def _fill(root: Path, installation: Installation) -> Workspace:
    workspace = Workspace(
        root=root,
        backends=root / "backends",
        current_directory=root / "cwd",
        command_directory=_command_directory(root),
        log=root / "tritonserver.log",
    )
    workspace.current_directory.mkdir()
    workspace.log.touch(mode=0o600)
    _link_backends(workspace.backends, installation)
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


def _command_directory(root: Path) -> Path:
    """Return a folder with a plain path whose `python3` is this interpreter, with its packages."""
    own, is_virtual = python_command_directory(), sys.prefix != sys.base_prefix
    if own is None and is_virtual:
        raise ServerError(
            f"The virtual environment {sys.prefix} has no bin/python3, which Triton's Python models are started with: "
            f"make it anew with `python3 -m venv`."
        )
    if own is not None and is_plain(own) and not (is_virtual and any(map(_stops_python, _packages()))):
        return own
    return _link_environment(root / "venv") if is_virtual else _link_python(root / "bin")


def _link_environment(directory: Path) -> Path:
    """Make a virtual environment of links to this one, in which all that Triton's Python reads is ASCII."""
    for path in (Path(sys.prefix, "pyvenv.cfg"), Path(sys.prefix, "bin", "python3"), *_packages()):
        link = directory / path.relative_to(sys.prefix)
        link.parent.mkdir(parents=True, exist_ok=True)
        if not _stops_python(path):
            link.symlink_to(path)
    return directory / "bin"


def _packages() -> list[Path]:
    """Return what lies in the virtual environment's site-packages."""
    return list(Path(sys.prefix).glob(f"lib*/python{PYTHON_VERSION}/site-packages/*"))


def _stops_python(path: Path) -> bool:
    """Say whether a Python that knows ASCII alone ends at this file: it names a folder like `größer`."""
    return path.suffix == ".pth" and not path.read_bytes().isascii()


def _link_python(directory: Path) -> Path:
    """Provide `python3` for a Python whose folder has no such command, e.g. only `python3.11`, or no plain path."""
    directory.mkdir()
    (directory / "python3").symlink_to(Path(sys.executable).resolve())
    return directory
