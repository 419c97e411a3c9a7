"""What served audio is compared with, and how."""

import diffusers
import numpy as np
import torch
from diffusers import AudioLDM2Pipeline


def relative_rms_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the RMS of the difference over the RMS of `expected`."""
    assert actual.shape == expected.shape
    difference = np.sqrt(np.mean(np.square(actual.astype(np.float64) - expected)))
    return float(difference / np.sqrt(np.mean(np.square(expected.astype(np.float64)))))


def seeded(seed: int) -> torch.Generator:
    """Return the generator that the contract's `seed` stands for."""
    return torch.Generator("cpu").manual_seed(seed)


def reference_audio(pipeline: AudioLDM2Pipeline, scheduler: str, seed: int, **arguments) -> np.ndarray:
    """Return what diffusers' own pipeline makes with that scheduler, float32 [waveforms, samples]."""
    original = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, scheduler).from_config(original.config)
    try:
        return pipeline(generator=seeded(seed), **arguments).audios
    finally:
        pipeline.scheduler = original
