"""The model `jobs`: its requests, and what its answers mean. Pure, as `_request` and `_result`."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from audioldm2_client._exceptions import AudioLDM2Error, ModelNotFoundError, ServerFaultError
from audioldm2_client._request import InferenceRequest, InputTensor, new_request_id
from audioldm2_client._result import GetTensor, read_output

DEFAULT_MODEL_NAME = "audioldm2"

CACHED_SUFFIX = "_cached"
"""Ends the name of an ensemble's twin whose answers the server caches."""

POLL_INTERVAL_S = 0.2
"""Time between two looks at the progress of a generation."""

JOBS_TIMEOUT_S = 5.0
"""Time allowed for one call of the model `jobs`, which only reads a few bytes."""

WATCH_TIMEOUT_S = 2.0
"""Time allowed for one while the caller waits for the generation itself, which may end in that time."""

JobState = Literal["queued", "denoising", "decoding", "done", "failed", "cancelled", "unknown"]
Action = Literal["status", "cancel"]


@dataclass(frozen=True)
class Progress:
    """How far a generation is.

    Attributes:
        state: "queued", "denoising", "decoding", "done", "failed" or "cancelled"; "unknown" where the server doesn't
            know the request: it hasn't arrived yet, or ended more than a minute ago.
        step: denoising steps that are done, of `num_inference_steps`.
        total_steps: the request's `num_inference_steps`; 0 while that isn't known.
        requests_ahead: requests before this one in the queue; 0 once it is denoised.
    """

    state: JobState
    step: int = 0
    total_steps: int = 0
    requests_ahead: int = 0


ProgressCallback = Callable[[Progress], object]


def jobs_model_name(model_name: str) -> str:
    """Return the name of the model that tells the progress of an ensemble."""
    ensemble = model_name.removesuffix(CACHED_SUFFIX)
    return "jobs" if ensemble == DEFAULT_MODEL_NAME else f"{ensemble}_jobs"


def build_jobs_request(generation: InferenceRequest, action: Action, timeout_s: float) -> InferenceRequest:
    """Return the request that asks for the progress of a generation, or cancels it."""
    return InferenceRequest(
        model_name=jobs_model_name(generation.model_name),
        id=new_request_id(),
        timeout_s=timeout_s,
        inputs=(_text("request_id", generation.id), _text("action", action)),
        prompts=(),
    )


def parse_progress(get_tensor: GetTensor, request: InferenceRequest) -> Progress:
    """Read an answer of the model `jobs`.

    Raises:
        ServerFaultError: it breaks the contract.
    """
    state = bytes(read_output(get_tensor, request, "state", 1)[0]).decode(errors="replace")
    if state not in get_args(JobState):
        raise ServerFaultError(
            f"model {request.model_name!r} must say one of {', '.join(get_args(JobState))}; got {state!r} "
            f"(request {request.id})",
            request_id=request.id,
        )
    step, total_steps, requests_ahead = (
        int(read_output(get_tensor, request, name, 1)[0]) for name in ("step", "total_steps", "requests_ahead")
    )
    return Progress(cast(JobState, state), step, total_steps, requests_ahead)


def no_jobs_error(error: ModelNotFoundError, request: InferenceRequest) -> ModelNotFoundError:
    """Return the error that says what a missing model `jobs` means for a caller that asked for progress."""
    return ModelNotFoundError(
        f"the server can't tell progress, because its model {request.model_name!r} isn't there; generating works "
        f"without it: {error}",
        server_message=error.server_message,
        request_id=error.request_id,
    )


class ProgressWatch:
    """Pick the answers of the model `jobs` that a callback has to be called with.

    Attributes:
        wanted: whether to ask again.
    """

    def __init__(self, callback: ProgressCallback | None) -> None:
        self._callback = callback
        self._last: Progress | None = None
        self.wanted = callback is not None

    def report(self, progress: Progress) -> None:
        """Call the callback if something has changed."""
        if self._callback is not None and progress not in (self._last, Progress("unknown")):
            self._last = progress
            self._callback(progress)

    def note_failure(self, error: AudioLDM2Error) -> None:
        """Note that the server couldn't be asked: stop where it has no model `jobs`, else ask again."""
        self.wanted = not isinstance(error, ModelNotFoundError)


def _text(name: str, value: str) -> InputTensor:
    return InputTensor(name, "BYTES", np.array([value.encode()], dtype=np.object_))
