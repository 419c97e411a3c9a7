"""From output tensors on the wire to a result in Python. Pure: shared by every protocol, blocking or not."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from audioldm2_client import _audio_file
from audioldm2_client._exceptions import ServerFaultError
from audioldm2_client._request import InferenceRequest

GetTensor = Callable[[str], "npt.NDArray[Any] | None"]
"""`InferResult.as_numpy`: the output of that name, None where the response has none."""


_NOT_RANKED = -2.0


@dataclass(frozen=True, eq=False)
class GenerationResult:
    """The result of a generation.

    Attributes:
        audio: float32 [n, samples], n = prompts x num_waveforms_per_prompt; the waveforms of the first prompt come
            first, per prompt best first. The nominal range is [-1, 1]; the model may go beyond it.
        sampling_rate: Hz.
        seed: pass it to `generate` to get the same audio again.
        clap_scores: float32 [n], similarity of text and audio; NaN where there was one waveform per prompt and so
            nothing to rank.
        prompts: those of the request.
        truncated_tokens: int32 [prompts], how many tokens at the end of each prompt were too many, and had no effect.
        request_id: the id that the request carried; the server's log names it.
    """

    audio: npt.NDArray[np.float32]
    sampling_rate: int
    seed: int
    clap_scores: npt.NDArray[np.float32]
    prompts: tuple[str, ...]
    truncated_tokens: npt.NDArray[np.int32]
    request_id: str = ""

    def save(self, path: str | os.PathLike[str], index: int = 0, *, subtype: str = "PCM_16") -> Path:
        """Write one waveform as a mono audio file. It is written completely or not at all, and replaces an older file.

        Args:
            path: ends in .wav or .flac; its folder must exist.
            index: the row of `audio`.
            subtype: libsndfile's name of the sample format. Integer formats, such as the default PCM_16, clip samples
                to [-1, 1]; "FLOAT" (WAV only) keeps them as they are.

        Returns:
            The path.

        Raises:
            ValueError: another extension, a subtype that the format doesn't have, or audio that isn't finite.
            IndexError: there is no such row.
            OSError: the folder doesn't exist or can't be written to.
        """
        rows = len(self.audio)
        if not -rows <= index < rows:
            raise IndexError(f"index must be one of the {rows} waveforms; got {index}")
        return _audio_file.write(Path(path), self.audio[index], self.sampling_rate, subtype)


def read_output(get_tensor: GetTensor, request: InferenceRequest, name: str, rank: int) -> npt.NDArray[Any]:
    """Return the output `name` with `rank` dimensions.

    Raises:
        ServerFaultError: it is missing or empty, or has another rank: the model breaks the contract.
    """
    tensor = get_tensor(name)
    if tensor is None or tensor.ndim != rank or tensor.size == 0:
        found = "none" if tensor is None else f"shape {list(tensor.shape)}"
        raise ServerFaultError(
            f"model {request.model_name!r} must return an output {name!r} of {rank} dimension(s), not empty; "
            f"got {found} (request {request.id})",
            request_id=request.id,
        )
    return tensor


def _read_scores(get_tensor: GetTensor, request: InferenceRequest) -> npt.NDArray[np.float32]:
    """Return the scores with NaN where there was nothing to rank: the contract's -2, as JSON has no NaN."""
    scores = read_output(get_tensor, request, "clap_score", 1).astype(np.float32)
    scores[scores == _NOT_RANKED] = np.nan
    return scores


def parse_response(get_tensor: GetTensor, request: InferenceRequest) -> GenerationResult:
    """Check and copy the outputs.

    Raises:
        ServerFaultError: as `read_output`.
    """
    return GenerationResult(
        # A copy: the output is a read-only view of the message.
        audio=read_output(get_tensor, request, "audio", 2).astype(np.float32),
        sampling_rate=int(read_output(get_tensor, request, "sampling_rate", 1)[0]),
        seed=int(read_output(get_tensor, request, "used_seed", 1)[0]),
        clap_scores=_read_scores(get_tensor, request),
        prompts=request.prompts,
        truncated_tokens=read_output(get_tensor, request, "truncated_tokens", 1).astype(np.int32),
        request_id=request.id,
    )
