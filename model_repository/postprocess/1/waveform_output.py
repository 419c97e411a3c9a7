"""From the vocoder's waveforms to the public outputs."""

import numpy as np

NOT_RANKED = -2.0
"""Below every cosine. Not NaN, which JSON doesn't have, nor an empty tensor, with which Triton caches no answer."""


def cut(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Return the first `num_samples` samples of each row, float32 [rows, num_samples]."""
    return np.ascontiguousarray(waveform[:, :num_samples])


def no_scores(num_waveforms: int) -> np.ndarray:
    """Return the scores of waveforms that aren't ranked, float32 [num_waveforms]."""
    return np.full(num_waveforms, NOT_RANKED, np.float32)
