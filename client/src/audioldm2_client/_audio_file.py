"""Write the files of results: completely, or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

_FORMATS = {".wav": "WAV", ".flac": "FLAC"}

PART_PATTERN = ".*.part"
"""Matches the temporary files that a killed process may leave behind."""


def check_path(path: Path) -> None:
    """Check before the generation that its result can be written to `path`.

    Raises:
        ValueError: the extension is neither .wav nor .flac.
        OSError: the folder doesn't exist or can't be written to, or `path` is a folder.
    """
    if path.suffix.lower() not in _FORMATS:
        raise ValueError(f"file name must end in {' or '.join(_FORMATS)}; got {str(path)!r}")
    check_folder(path)


def write(path: Path, waveform: npt.NDArray[np.float32], sampling_rate: int, subtype: str) -> Path:
    """Write `waveform`, float32 [samples], as a mono file of the format that the extension names.

    libsndfile itself clips to [-1, 1] where the subtype is one of integers.

    Raises:
        ValueError: as `check_path`; a subtype that the format doesn't have; audio that isn't finite.
        OSError: as `check_path`.
    """
    import soundfile  # here, because it loads a shared library, which not every user of this package needs

    check_path(path)
    file_format = _FORMATS[path.suffix.lower()]
    if not soundfile.check_format(file_format, subtype):
        allowed = ", ".join(soundfile.available_subtypes(file_format))
        raise ValueError(f"subtype of a {file_format} file must be one of {allowed}; got {subtype!r}")
    if not np.isfinite(waveform).all():
        raise ValueError("audio holds NaN or infinite samples; it can't be written as sound")
    with whole_file(path) as temporary:
        soundfile.write(temporary, waveform, sampling_rate, format=file_format, subtype=subtype)
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file written there is renamed to `path` if the block raises nothing.

    It is flushed to the disk before it is renamed, so that a power failure can't leave half of it either.
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
    """Check before the generation that a file can be written at `path`.

    Raises:
        OSError: the folder doesn't exist or can't be written to, or `path` is a folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"folder {str(path.parent)!r} doesn't exist; create it first")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"folder {str(path.parent)!r} isn't writable")
