"""Everything that is checked before tritonserver starts, so that a person reads one sentence and not Triton's log."""

import errno
import ipaddress
import os
import platform
import re
import socket
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from server.artefacts import check_artefacts
from server.errors import ServerError
from server.workspace import BACKENDS

MINIMUM_GLIBC = (2, 35)

_EXPORT_COMMAND = "python -m export --checkpoint DIR_OR_HUB_ID --output"
# Models without which this one doesn't load: an ensemble's steps, and the one whose modules a Python stage imports.
_REFERENCES = re.compile(
    r"""(?:\bmodel_name\s*:|\bkey\s*:\s*"jobs_model"\s*value\s*:?\s*{\s*string_value\s*:)\s*["']([^"'/]+)["']"""
)
_WEIGHTS_FILE = {"onnxruntime": "model.onnx", "python": "model.py"}


def check_platform() -> None:
    """Check that the wheel's binaries run here.

    Raises:
        ServerError: This is not x86-64 Linux with a recent enough glibc.
    """
    machine = f"{platform.system()} on {platform.machine()}"
    if machine != "Linux on x86_64":
        raise ServerError(
            f"The embedded Triton server runs on Linux on x86_64 only, and this is {machine}: use a container."
        )
    version = _glibc_version()
    if version < MINIMUM_GLIBC:
        found = f"glibc {version[0]}.{version[1]}" if version > (0, 0) else "another C library"
        raise ServerError(
            f"The embedded Triton server needs glibc {MINIMUM_GLIBC[0]}.{MINIMUM_GLIBC[1]} or newer (Ubuntu 22.04, "
            f"Debian 12), and this system has {found}: use a container."
        )


def _glibc_version() -> tuple[int, int]:
    """Version of the running glibc; (0, 0) where the C library is another one."""
    try:
        text = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return (0, 0)
    match = re.search(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def resolve_host(host: str, option: str) -> str:
    """Resolve a host name to the IPv4 address to listen on.

    Raises:
        ServerError: It has none.
    """
    try:
        addresses = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise ServerError(
            f"{option} must be an IPv4 address or a name that has one, and {host!r} is neither."
        ) from error
    return str(addresses[0][4][0])


def is_loopback(address: str) -> bool:
    """Say whether only this machine reaches an IPv4 address."""
    return ipaddress.ip_address(address).is_loopback


@dataclass(frozen=True)
class Listener:
    """An endpoint of the server: the option that sets its port, its IPv4 address, and the port (0: any free one)."""

    option: str
    address: str
    port: int


def choose_ports(listeners: Sequence[Listener]) -> list[int]:
    """Check that every port is free, and pick one where any will do.

    Returns:
        The ports, in the order of `listeners`.

    Raises:
        ServerError: A port is out of range, named twice, taken or not allowed.
    """
    _check_ranges(listeners)
    with ExitStack() as stack:
        return [stack.enter_context(_bind(listener)).getsockname()[1] for listener in listeners]


def _check_ranges(listeners: Sequence[Listener]) -> None:
    options: dict[int, str] = {}
    for listener in listeners:
        if not 0 <= listener.port <= 65535:
            raise ServerError(f"{listener.option} must be 0 to 65535 (0 picks a free port), and is {listener.port}.")
        if listener.port and listener.port in options:
            raise ServerError(
                f"{options[listener.port]} and {listener.option} are both {listener.port}: give each a port of its own."
            )
        options[listener.port] = listener.option


def _bind(listener: Listener) -> socket.socket:
    probe = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if listener.port:  # As servers do: connections that have just been closed don't block the port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((listener.address, listener.port))
        probe.listen(1)
    except OSError as error:
        probe.close()
        raise ServerError(_bind_failure(listener, error)) from error
    return probe


def _bind_failure(listener: Listener, error: OSError) -> str:
    place = f"Port {listener.port} on {listener.address}"
    if error.errno == errno.EADDRINUSE:
        return f"{place} is taken: choose another one with {listener.option} (0 picks a free port)."
    if error.errno == errno.EADDRNOTAVAIL:
        return f"This machine has no address {listener.address}: choose one that it has, or 127.0.0.1."
    return f"{place} cannot be used ({error.strerror}): choose another one with {listener.option}."


def check_model_repository(directory: Path) -> None:
    """Check that each model of a repository has its configuration, a version and its weights, as they were exported.

    Raises:
        ServerError: Something is missing, damaged or can't be read; the sentence names it and says what to do.
    """
    try:
        _check_models(directory)
    except OSError as error:
        path, reason = error.filename or directory, error.strerror or str(error)
        raise ServerError(_unreadable(directory, path, error.errno, reason)) from error


def _check_models(directory: Path) -> None:
    if not directory.is_dir():
        raise ServerError(f"There is no model repository at {directory}: run `{_EXPORT_COMMAND} {directory}`.")
    models = sorted(entry for entry in directory.iterdir() if entry.is_dir())
    if not models:
        raise ServerError(f"The model repository {directory} has no models: run `{_EXPORT_COMMAND} {directory}`.")
    for model in models:
        for folder, _, names in os.walk(model, onerror=_raise):
            for file in names:
                if (path := Path(folder, file)).exists() and not os.access(path, os.R_OK):  # not a link to nothing
                    raise ServerError(_unreadable(directory, path, errno.EACCES, os.strerror(errno.EACCES)))
    needed = [path for model in models for path in _needed_paths(model)]
    check_artefacts(directory, [path.relative_to(directory).as_posix() for path in needed if not path.exists()])
    for model in models:
        _check_model(model)


def _raise(error: OSError) -> None:
    raise error


def _unreadable(directory: Path, path: str | Path, code: int | None, reason: str) -> str:
    right = f"give this user (id {os.geteuid()}) the right to read it"
    advice = right if code in (errno.EACCES, errno.EPERM) else "see to its disk, or copy it again"
    return f"The model repository {directory} can't be read ({reason}: {path}): {advice}."


def _needed_paths(model: Path) -> list[Path]:
    """Files and other models without which Triton can't load a model of the repository."""
    text, versions = config_text(model), _versions(model)
    needed = [model.parent / name for name in _REFERENCES.findall(re.sub(r"#.*", "", text))]
    file_name = string_field(text, "default_model_filename") or _WEIGHTS_FILE.get(string_field(text, "backend"), "")
    return [*needed, versions[-1] / file_name] if file_name and versions else needed


def _check_model(model: Path) -> None:
    """Check a model's configuration and that it has a version folder."""
    config = model / "config.pbtxt"
    if not config.is_file():
        raise ServerError(
            f"{model} has no config.pbtxt, and Triton takes every folder of a model repository for a model, hidden "
            f"ones too: add the file, or move the folder elsewhere."
        )
    if not _versions(model):
        raise ServerError(f"{model} has no version folder: make {model / '1'} (an ensemble's stays empty).")
    text = config_text(model)
    if not text.strip():
        raise ServerError(
            f"{config} is empty: take the one of the project's model_repository, or export into another folder."
        )
    backend = string_field(text, "backend")
    if backend and not (BACKENDS / backend).is_dir() and backend not in _WEIGHTS_FILE:
        raise ServerError(
            f"{config} asks for the backend {backend!r}, and the embedded server has {_and(_WEIGHTS_FILE)} only: run "
            f"this model in Triton's container."
        )


def config_text(model: Path) -> str:
    """Return a model's configuration, whatever is in it; an empty string where there is none."""
    config = model / "config.pbtxt"
    return config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""


def _versions(model: Path) -> list[Path]:
    """Return a model's version folders, the newest last."""
    folders = [entry for entry in model.iterdir() if entry.is_dir() and re.fullmatch("[1-9][0-9]*", entry.name)]
    return sorted(folders, key=lambda folder: int(folder.name))


def string_field(config: str, name: str) -> str:
    """Value of a string field that stands at the start of a line of a `config.pbtxt`; an empty string without one."""
    match = re.search(rf"""^\s*{name}\s*:\s*["']([^"']*)["']""", config, re.MULTILINE)
    return match[1] if match else ""


def _and(items: Iterable[str]) -> str:
    *head, last = items
    return f"{', '.join(head)} and {last}" if head else last
