"""From the vocoder's waveforms to the public outputs."""

import time
from collections.abc import Mapping

import numpy as np

NOT_RANKED = -2.0
"""Below every cosine. Not NaN, which JSON doesn't have, nor an empty tensor, with which Triton caches no answer."""

MAX_SAMPLING_RATE = 1_000_000


class PostprocessError(Exception):
    """A request gets no audio. The text is what the client reads.

    Attributes:
        reason: The contract's tag, with which the text starts.
        code: The name of Triton's error code.
    """

    def __init__(self, reason: str, sentence: str, code: str = "") -> None:
        super().__init__(f"[{reason}] {sentence}")
        self.reason, self.code = reason, code or reason


def check_wanted(inputs: Mapping[str, np.ndarray], is_cancelled: bool) -> None:
    """Look whether the client still waits.

    Raises:
        PostprocessError: It was cancelled, or its time is up.
    """
    if is_cancelled:
        raise PostprocessError("CANCELLED", "the request was cancelled after its last step.")
    deadline_unix_us = int(inputs.get("deadline_unix_us", [0])[0])
    if deadline_unix_us and time.time_ns() // 1000 >= deadline_unix_us:
        raise PostprocessError("DEADLINE", "the time was up after the last step.", code="CANCELLED")


def check_sizes(inputs: Mapping[str, np.ndarray]) -> None:
    """Look whether the tensors fit each other, before anything is computed with them.

    Raises:
        PostprocessError: One doesn't; the text names it.
    """
    waveforms, samples = inputs["waveform"].shape
    if waveforms < 1:
        raise PostprocessError("INVALID_ARG", "waveform must have at least 1 row, got 0.")
    _check_bound("num_samples", int(inputs["num_samples"][0]), samples, "the samples of waveform")
    _check_bound("num_waveforms_per_prompt", int(inputs["num_waveforms_per_prompt"][0]), waveforms, "its rows")
    candidates = int(inputs["num_waveforms_per_prompt"][0])
    if waveforms % candidates:
        raise PostprocessError(
            "INVALID_ARG",
            f"num_waveforms_per_prompt must divide the {waveforms} rows of waveform, got {candidates}.",
        )
    prompts, rows = waveforms // candidates, len(inputs["clap_text_embeds"])
    if candidates > 1 and rows < prompts:
        raise PostprocessError(
            "INVALID_ARG", f"clap_text_embeds must have a row for each of the {prompts} prompts, got {rows}."
        )
    _check_bound("sampling_rate", int(inputs["sampling_rate"][0]), MAX_SAMPLING_RATE, "Hz")


def check_embeds(audio_embeds: np.ndarray, text_embeds: np.ndarray) -> None:
    """Look whether the embeddings of audio and text are of one width.

    Raises:
        PostprocessError: They aren't.
    """
    if audio_embeds.shape[1:] != text_embeds.shape[1:]:
        raise PostprocessError(
            "INVALID_ARG",
            f"clap_text_embeds must be {audio_embeds.shape[1]} wide, as CLAP's audio is, got {text_embeds.shape[1]}.",
        )


def check_finite(array: np.ndarray, what_is: str) -> None:
    """Look whether all numbers are finite, as JSON's are.

    Raises:
        PostprocessError: One isn't.
    """
    if not np.isfinite(array).all():
        raise PostprocessError("INTERNAL", f"{what_is} not finite: try a smaller guidance_scale, or another scheduler.")


def _check_bound(name: str, value: int, high: int, what: str) -> None:
    if not 1 <= value <= high:
        raise PostprocessError(
            "INVALID_ARG", f"{name} is out of bounds: it must be between 1 and {high} ({what}), got {value}."
        )


def cut(waveform: np.ndarray, num_samples: int) -> np.ndarray:
    """Return the first `num_samples` samples of each row, float32 [rows, num_samples]."""
    return np.ascontiguousarray(waveform[:, :num_samples])


def no_scores(num_waveforms: int) -> np.ndarray:
    """Return the scores of waveforms that aren't ranked, float32 [num_waveforms]."""
    return np.full(num_waveforms, NOT_RANKED, np.float32)
