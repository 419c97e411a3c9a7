"""Audio files: what can be written where, and writing it."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from audioldm2_client._whole_file import check_folder, whole_file

_FORMATS = {".wav": "WAV", ".flac": "FLAC"}


def check_path(path: Path) -> None:
    """Find out before the work whether its result can be written to `path`.

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
