"""Describe a result, for people and as JSON."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audioldm2_client._result import GenerationResult


def waveform_paths(first: Path, count: int) -> list[Path]:
    """Return the files of a result: FILE for one waveform, FILE-1, FILE-2, ... for several."""
    return [first] if count == 1 else [first.with_stem(f"{first.stem}-{index + 1}") for index in range(count)]


def save(result: GenerationResult, output: Path) -> list[Path]:
    """Write every waveform; return the paths, best first."""
    paths = waveform_paths(output, len(result.audio))
    return [result.save(path, index) for index, path in enumerate(paths)]


def lines(result: GenerationResult, paths: Sequence[Path]) -> list[str]:
    """Describe every file in a line."""
    length_s = result.audio.shape[1] / result.sampling_rate
    return [
        f"{path}: {length_s:.2f} s at {result.sampling_rate} Hz"
        + ("" if len(paths) == 1 else f", CLAP score {result.clap_scores[index]:.3f}")
        for index, path in enumerate(paths)
    ]


def as_json(result: GenerationResult, paths: Sequence[Path], elapsed_s: float) -> dict[str, Any]:
    """Describe the result; where there was nothing to rank, the scores are null."""
    return {
        "prompt": result.prompts[0],
        "files": [str(path) for path in paths],
        "seed": result.seed,
        "sampling_rate": result.sampling_rate,
        "audio_length_in_s": result.audio.shape[1] / result.sampling_rate,
        "clap_scores": [None if math.isnan(score) else round(float(score), 6) for score in result.clap_scores],
        "truncated_tokens": int(result.truncated_tokens.max()),
        "request_id": result.request_id,
        "elapsed_s": round(elapsed_s, 3),
    }
