"""A request that is being denoised."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from denoising_errors import DeadlineError, DenoisingError
from denoising_request import DenoisingRequest
from scheduler_steps import Steps
from text_conditioning import Conditioning
from torch import Tensor
from unet_forward import UNetForward

NUM_NOISES = 2
"""The first two tensors of a waveform are its noise predictions: the unconditional one, and the one with the prompt."""


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        step: Scheduler steps that are done.
        total_steps: How many there will be: the request's num_inference_steps.
        is_waiting: Whether it is in the queue.
        requests_ahead: Requests before it in the queue.
    """

    step: int
    total_steps: int
    is_waiting: bool = False
    requests_ahead: int = 0


def not_cancelled() -> bool:
    """Return False: the default of a request that can't be cancelled."""
    return False


def ignore_progress(_: Progress) -> None:
    """Do nothing: the default of a request whose progress isn't watched."""


def ignore_start() -> None:
    """Do nothing: the default of a request whose start isn't watched."""


@dataclass(eq=False)
class Job:
    """A request with the state of its denoising.

    A *row* is one entry of the UNet's batch. A waveform has one, or with guidance two: the unconditional one and then
    the one with the prompt. They have the numbers 2 w and 2 w + 1 of waveform w, also where only the second one is
    computed: without guidance, and at forwards outside of the request's interval of guidance. When all rows of a job
    have gone through the UNet, in one call or in several, the job has done a forward, and its latents move on to the
    next timestep. A scheduler step takes one forward or, with some schedulers, two or more.

    Attributes:
        request: What was asked for.
        steps: The scheduler.
        deadline: When the client's time is up, on the loop's clock; None for never.
        is_cancelled: Asks whether the client still wants it; may be slow.
        on_progress: Called with how far it is; may be slow.
        on_start: Called when it gets its rows; must be quick.
        arrived_s: When it came, on the loop's clock.
        future: Gets the latents, float32 [waveforms, channels, frames, bins] on the CPU, or a DenoisingError.
        forwards_done: How many of `steps.timesteps` are behind it.
        rows_done: Rows of the present forward that have gone through the UNet.
        used_s: Seconds of the UNet's time that it has had, its share of forwards with others.
        fair_share_s: Seconds that an equal share of the time since it was admitted would have been.
        conditioning: Set by the loop: of the request's prompts, with guidance negative ones first, one row each.
        tensors: Set by the loop: float32 [waveforms, 2 + memory, channels, frames, bins]: the two noise predictions,
            the latents, and what else the scheduler remembers; a view of DenoisingSlots' states.
    """

    request: DenoisingRequest
    steps: Steps
    deadline: float | None = None
    is_cancelled: Callable[[], bool] = not_cancelled
    on_progress: Callable[[Progress], object] = ignore_progress
    on_start: Callable[[], object] = ignore_start
    arrived_s: float = 0.0
    future: "Future[Tensor]" = field(default_factory=Future)
    forwards_done: int = 0
    rows_done: int = 0
    used_s: float = 0.0
    fair_share_s: float = 0.0
    conditioning: Conditioning = field(init=False)
    tensors: Tensor = field(init=False)
    _error: DenoisingError | None = None
    _guided: range = field(init=False)

    def __post_init__(self) -> None:
        forwards = range(self.num_forwards)
        guided = [forward for forward in forwards if self.request.is_guided(forward, self.num_forwards)]
        self._guided = range(guided[0], guided[-1] + 1) if guided else range(0)

    @property
    def is_guided(self) -> bool:
        """Whether the present forward has guidance."""
        return self.forwards_done in self._guided

    @property
    def rows(self) -> range:
        """Numbers of the rows that the present forward has."""
        rows = 2 * self.request.num_waveforms
        return range(rows) if self.is_guided else range(1, rows, 2)

    @property
    def share_done(self) -> float:
        """Part of the rows of all of its forwards that has gone through the UNet, 0 to 1."""
        return (self._rows_before(self.forwards_done) + self.rows_done) / self._rows_before(self.num_forwards)

    def _rows_before(self, forward: int) -> int:
        guided = range(self._guided.start, min(forward, self._guided.stop))
        return self.request.num_waveforms * (forward + len(guided))

    @property
    def num_forwards(self) -> int:
        """Forwards from noise to result; some schedulers take two per step."""
        return len(self.steps.timesteps)

    @property
    def num_steps(self) -> int:
        """Scheduler steps from noise to result, as the request asks for them."""
        return self.request.scheduler.num_inference_steps

    @property
    def steps_done(self) -> int:
        """Scheduler steps that are done: those whose forwards are, where each step takes equally many."""
        return self.forwards_done * self.num_steps // self.num_forwards

    @property
    def progress(self) -> str:
        """How far it is, for a sentence."""
        if not hasattr(self, "tensors"):
            return "before there was room in the denoising loop"
        return f"after {self.steps_done} of {self.num_steps} steps"

    def deadline_error(self, now: float) -> DeadlineError | None:
        """Return an error once the client's time is up."""
        if self.deadline is None or now < self.deadline:
            return None
        return DeadlineError(f"the time was up {self.progress}.")

    @property
    def latents(self) -> Tensor:
        """The present latents, float32 [waveforms, channels, frames, bins]."""
        return self.tensors[:, NUM_NOISES]

    @property
    def error(self) -> DenoisingError | None:
        """Why it must stop; None while it goes on."""
        return self._error

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Jobs with equal keys can share a forward: latents of one size, and equally many vectors of GPT-2's."""
        _, channels, frames, bins = self.request.latents_shape
        return channels, frames, bins, self.request.generated_prompt_embeds.shape[1]

    def project_text(self, unet: UNetForward) -> None:
        """Compute what the UNet's layers need of the text, once for all steps."""
        request = self.request
        self.conditioning = unet.project(request.generated_prompt_embeds, request.prompt_embeds, request.attention_mask)

    def abort(self, error: DenoisingError) -> None:
        """Ask the loop to stop it after the present forward; safe from any thread. The first reason counts."""
        self._error = self._error or error

    def guided(self, coefficients: np.ndarray) -> np.ndarray:
        """Let guidance into a linear scheduler's weights.

        Args:
            coefficients: Of a StepTable, float32 [forwards, memory, memory + 1].

        Returns:
            float32 [forwards, memory, 2 + memory]. Columns: the unconditional noise prediction, the one with the
            prompt, the state. Guidance is the weighted sum (1 - scale) * unconditional + scale * with prompt.
        """
        scale = np.ones((len(coefficients), 1, 1), np.float32)
        if self._guided:
            scale[self._guided.start : self._guided.stop] = self.request.guidance_scale
        noise = coefficients[..., -1:]
        return np.concatenate([noise * (1.0 - scale), noise * scale, coefficients[..., :-1]], axis=-1, dtype=np.float32)
