"""Spectrograms as PNG files: time to the right, frequency upwards, colour for the level. They need Pillow."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import numpy.typing as npt

from audioldm2_client._audio_file import check_folder, whole_file

_WINDOW = 512  # samples: 32 ms at 16 kHz
_COLUMNS = 1024
_RANGE_DB = 80.0
# From silence to the loudest: black, violet, red, orange, pale yellow.
_COLOURS = np.array([[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float64)


def check(path: Path) -> None:
    """Check before the generation that a spectrogram can be written to `path`.

    Raises:
        ValueError: the extension isn't .png, or Pillow isn't installed.
        OSError: the folder doesn't exist or can't be written to.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"file name of a spectrogram must end in .png; got {str(path)!r}")
    if find_spec("PIL") is None:
        raise ValueError("a spectrogram needs Pillow; install it with: pip install 'audioldm2-client[spectrogram]'")
    check_folder(path)


def write(path: Path, waveform: npt.NDArray[np.float32]) -> None:
    """Write the spectrogram of `waveform`, float32 [samples], from 0 Hz at the bottom to half the sampling rate."""
    from PIL import Image

    with whole_file(path) as temporary:
        Image.fromarray(_colour(_levels_db(waveform)), "RGB").save(temporary, format="PNG")


def _levels_db(waveform: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return levels below the loudest, float64 [frequencies, columns], the highest frequency first."""
    padded = np.pad(waveform, (0, max(0, _WINDOW - len(waveform))))
    starts = np.linspace(0, len(padded) - _WINDOW, min(_COLUMNS, 1 + len(padded) // 64)).astype(int)
    frames = padded[starts[:, None] + np.arange(_WINDOW)] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(frames)) ** 2
    levels: npt.NDArray[np.float64] = 10 * np.log10(np.maximum(power, 1e-20) / max(power.max(), 1e-20))
    return levels.T[::-1]


def _colour(levels_db: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Return colours, uint8 [rows, columns, 3]."""
    position = np.clip(1 + levels_db / _RANGE_DB, 0, 1) * (len(_COLOURS) - 1)
    channels = [np.interp(position, np.arange(len(_COLOURS)), _COLOURS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.uint8)
