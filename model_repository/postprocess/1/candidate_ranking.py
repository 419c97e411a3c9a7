"""Ranks the candidates of each prompt by CLAP: how well the sound fits the text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soxr
from transformers import ClapFeatureExtractor


class CandidateRanking:
    """What comes before and after CLAP's audio tower, which is a model of its own.

    Args:
        folder: Where the checkpoint's `preprocessor_config.json` lies.
    """

    def __init__(self, folder: Path) -> None:
        self._extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)

    def input_features(self, audio: np.ndarray, sampling_rate: int, seed: int) -> np.ndarray:
        """Return CLAP's log-mel features, float32 [waveforms, 1, frames, mel bins].

        Of audio beyond the extractor's length (10 s) a crop is scored, as by diffusers, where numpy's global generator
        chooses it. Here it follows the seed: it is the one that `numpy.random.seed(seed % 2**32)` leads to there.

        Args:
            audio: float32 [waveforms, samples].
            sampling_rate: Of `audio`, Hz.
            seed: Of the request.
        """
        resampled = [soxr.resample(waveform, sampling_rate, self._extractor.sampling_rate) for waveform in audio]
        crops = self._crops(resampled, np.random.RandomState(seed % 2**32))
        features = self._extractor(crops, sampling_rate=self._extractor.sampling_rate, return_tensors="np")
        return features["input_features"].astype(np.float32)

    def _crops(self, waveforms: Sequence[np.ndarray], random: np.random.RandomState) -> list[np.ndarray]:
        length = self._extractor.nb_max_samples
        starts = [
            random.randint(0, len(waveform) - length + 1) if len(waveform) > length else 0 for waveform in waveforms
        ]
        return [waveform[start : start + length] for waveform, start in zip(waveforms, starts, strict=True)]


def similarities(audio_embeds: np.ndarray, text_embeds: np.ndarray) -> np.ndarray:
    """Return the cosine similarity of each waveform with its own prompt, float32 [waveforms].

    Args:
        audio_embeds: float32 [waveforms, CLAP width], of length 1; equally many consecutive waveforms per prompt.
        text_embeds: float32 [prompts, CLAP width], of length 1.
    """
    texts = text_embeds.repeat(len(audio_embeds) // len(text_embeds), axis=0)
    return np.sum(audio_embeds * texts, axis=1, dtype=np.float32)


def best_first(scores: np.ndarray, num_waveforms_per_prompt: int) -> np.ndarray:
    """Return the waveforms' indices with each prompt's best first, int64 [waveforms]."""
    per_prompt = scores.reshape(-1, num_waveforms_per_prompt)
    order = np.argsort(-per_prompt, axis=1, kind="stable")
    return (order + num_waveforms_per_prompt * np.arange(len(per_prompt))[:, None]).reshape(-1)
