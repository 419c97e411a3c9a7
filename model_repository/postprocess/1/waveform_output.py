"""From the vocoder's waveforms to the public outputs."""

import numpy as np


def cut(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Return the first `num_samples` samples of each row, float32 [rows, num_samples]."""
    return np.ascontiguousarray(waveform[:, :num_samples])


def no_scores(num_waveforms: int) -> np.ndarray:
    """Return the scores of waveforms that aren't ranked: NaN, float32 [num_waveforms]."""
    return np.full(num_waveforms, np.nan, np.float32)
