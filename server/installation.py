"""Find what the embedded server is made of: the files of the nvidia-pytriton wheel, and this Python's own library.

pytriton is never imported: it is only the parcel in which a tritonserver binary comes.
"""

import importlib.util
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from server.errors import ServerError

WHEEL = "nvidia-pytriton==0.7.0"
PYTHON_VERSION = f"{sys.version_info.major}.{sys.version_info.minor}"


@dataclass(frozen=True)
class Installation:
    """Paths of everything that starting tritonserver needs.

    Attributes:
        tritonserver: The server's executable.
        python_backend_library: `libtriton_python.so`.
        python_backend_utils: `triton_python_backend_utils.py`.
        python_backend_stub: The process that hosts one Python model, built for this version of Python.
        cache_directory: Folder of the response cache implementations, for `--cache-directory`.
        library_directories: Folders for `LD_LIBRARY_PATH`: this Python's shared library, and the wheel's own.
    """

    tritonserver: Path
    python_backend_library: Path
    python_backend_utils: Path
    python_backend_stub: Path
    cache_directory: Path
    library_directories: tuple[Path, ...]


def find_installation() -> Installation:
    """Find all files that the embedded server needs.

    Raises:
        ServerError: The wheel is missing or incomplete, has no stub for this Python, or this Python is a static build.
    """
    package = _package_directory("pytriton")
    root = package / "tritonserver"
    python_backend = root / "backends" / "python"
    return Installation(
        tritonserver=_existing(root / "bin" / "tritonserver"),
        python_backend_library=_existing(python_backend / "libtriton_python.so"),
        python_backend_utils=_existing(python_backend / "triton_python_backend_utils.py"),
        python_backend_stub=_stub(root / "python_backend_stubs"),
        cache_directory=_existing(root / "caches"),
        library_directories=(libpython_directory(), _existing(package.parent / "nvidia_pytriton.libs")),
    )


def libpython_directory(candidates: Iterable[Path] | None = None) -> Path:
    """Find the folder of this Python's shared library, which Triton's Python backend loads.

    Args:
        candidates: Folders to search; by default those that `sysconfig` and this interpreter's prefix name.

    Raises:
        ServerError: None of them has it, as with a statically linked Python.
    """
    name = f"libpython{PYTHON_VERSION}.so.1.0"
    searched = list(_default_library_directories() if candidates is None else candidates)
    for directory in searched:
        if (directory / name).is_file():
            return directory
    raise ServerError(
        f"This Python ({sys.executable}) has no shared library: {name} is in none of "
        f"{', '.join(str(directory) for directory in searched)}. Triton's Python backend needs it: use a Python that "
        f"was built with --enable-shared (pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared), or install "
        f"libpython{PYTHON_VERSION}."
    )


def python_command_directory() -> Path | None:
    """Folder in which `python3` is this very interpreter, or None where there is no such folder.

    Triton's stub ignores PYTHONPATH. Like any embedded Python it takes the first `python3` on PATH for its program, and
    finds site-packages (through `pyvenv.cfg`, in a virtual environment) from there.
    """
    directory = Path(sys.executable).parent
    command = directory / "python3"
    if command.exists() and command.samefile(sys.executable):
        return directory
    return None


def _default_library_directories() -> list[Path]:
    library_directory = Path(sysconfig.get_config_var("LIBDIR") or "/usr/lib")
    multiarch = sysconfig.get_config_var("MULTIARCH") or ""
    candidates = [library_directory, library_directory / multiarch, Path(sys.base_prefix) / "lib"]
    return list(dict.fromkeys(candidates))


def _package_directory(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            f"The embedded Triton server is missing from this Python ({sys.executable}): run `pip install {WHEEL}`."
        )
    return Path(spec.submodule_search_locations[0])


def _stub(directory: Path) -> Path:
    stub = directory / PYTHON_VERSION / "triton_python_backend_stub"
    if not stub.is_file():
        versions = sorted(
            (p.name for p in _existing(directory).iterdir()), key=lambda v: [int(n) for n in v.split(".")]
        )
        raise ServerError(
            f"Triton's Python backend in {WHEEL} has no stub for Python {PYTHON_VERSION}; "
            f"use one of Python {', '.join(versions)}."
        )
    return stub


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ServerError(
            f"The installed nvidia-pytriton lacks {path}: run `pip install --force-reinstall --no-deps {WHEEL}`."
        )
    return path
