"""A scheduler's steps as weights, found by probing.

Most of diffusers' deterministic schedulers are linear multistep methods: the next latents, and whatever the scheduler
remembers for later, are weighted sums of the present latents, the noise prediction and what it remembers. The weights
are found once, by letting diffusers' own class do its steps on unit vectors, and are checked on random numbers in the
same run.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from denoising_errors import SchedulerStepsError
from denoising_request import SchedulerRequest
from diffusers import SchedulerMixin
from torch import Tensor

MAX_MEMORY = 6
"""Tensors of a request's state, its latents included: DPM++ needs 2, UniPC 4."""

NUM_WITNESSES = 8
"""Random numbers that go through the scheduler beside the unit vectors, to see whether it is linear."""

STATE = "latents"

Weights = dict[str, dict[str, float]]
"""For each tensor of the next state, the weight of each present one and of the noise prediction, ''."""


@dataclass(frozen=True)
class StepTable:
    """A linear scheduler, worked out.

    Attributes:
        timesteps: float32 [forwards], what the UNet gets.
        input_scales: float32 [forwards], what the latents are multiplied by before the UNet sees them.
        coefficients: float32 [forwards, memory, memory + 1]. The next state is this matrix times the present one with
            the noise prediction below it; the latents are the first row of a state.
        init_noise_sigma: What the starting noise is multiplied by.
    """

    timesteps: np.ndarray
    input_scales: np.ndarray
    coefficients: np.ndarray
    init_noise_sigma: float

    @property
    def memory(self) -> int:
        """Tensors in a state."""
        return self.coefficients.shape[1]


def make_step_table(scheduler: SchedulerMixin, request: SchedulerRequest) -> StepTable | None:
    """Find the weights of every step of `scheduler`, a new one.

    Returns:
        None where the steps aren't weighted sums, or where it would have to remember more than MAX_MEMORY tensors.

    Raises:
        SchedulerStepsError: It can't do so many steps.
    """
    with as_scheduler_error(request):
        scheduler.set_timesteps(request.num_inference_steps)
        generator = torch.Generator("cpu").manual_seed(0)
        options = step_options(scheduler, generator, request.eta)
        untouched = generator.get_state()
        random = torch.Generator("cpu").manual_seed(1)
        names: tuple[str, ...] = (STATE,)
        steps: list[Weights] = []
        input_scales = []
        for timestep in scheduler.timesteps:
            input_scales.append(float(scheduler.scale_model_input(torch.ones(()), timestep)))
            step = _probe(scheduler, timestep, names, options, random)
            if step is None or not torch.equal(generator.get_state(), untouched):
                return None
            steps.append(step)
            names = tuple(step)
        coefficients = _dense(steps)
    if coefficients.shape[1] > MAX_MEMORY:
        return None
    return StepTable(
        timesteps=scheduler.timesteps.float().cpu().numpy(),
        input_scales=np.array(input_scales, np.float32),
        coefficients=coefficients,
        init_noise_sigma=float(scheduler.init_noise_sigma),
    )


def _probe(
    scheduler: SchedulerMixin,
    timestep: Tensor,
    names: tuple[str, ...],
    options: Mapping[str, Any],
    random: torch.Generator,
) -> Weights | None:
    """Do one step on unit vectors; None unless the random numbers beside them come out as the same weighted sums."""
    sources = (*names, "")
    witnesses = torch.randn(len(sources), NUM_WITNESSES, generator=random) * 4
    # [source, 1, values, 1, 1]: shaped as latents, for schedulers that look at dimensions.
    probes = torch.cat([torch.eye(len(sources)), witnesses], dim=1)[:, None, :, None, None]
    for name, probe in zip(names, probes, strict=False):
        if name != STATE:
            _remember(scheduler, name, probe)
    latents = scheduler.step(probes[-1], timestep, probes[0], **options, return_dict=False)[0]
    after = {STATE: latents, **_memories(scheduler, probes.shape[1:])}
    weights: Weights = {}
    for name, tensor in after.items():
        values = tensor.flatten().double()
        row, outcome = values[: len(sources)], values[len(sources) :]
        expected = row @ witnesses.double()
        if not torch.allclose(outcome, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(expected.abs().max()))):
            return None
        weights[name] = dict(zip(sources, row.tolist(), strict=True))
    return weights


def _memories(scheduler: SchedulerMixin, shape: torch.Size) -> dict[str, Tensor]:
    """Return every tensor of that shape that the scheduler holds on to, by attribute, with the index in a list."""
    found = {}
    for attribute, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.shape == shape:
            found[attribute] = value
        elif isinstance(value, list):
            found |= {
                f"{attribute}.{index}": item
                for index, item in enumerate(value)
                if isinstance(item, Tensor) and item.shape == shape
            }
    return found


def _remember(scheduler: SchedulerMixin, name: str, tensor: Tensor) -> None:
    attribute, _, index = name.partition(".")
    if index:
        getattr(scheduler, attribute)[int(index)] = tensor
    else:
        setattr(scheduler, attribute, tensor)


def _dense(steps: list[Weights]) -> np.ndarray:
    """Return float32 [forwards, memory, memory + 1], without what never influences the last latents."""
    needed: list[tuple[str, ...]] = [(STATE,)]
    for weights in reversed(steps):
        used = {source for name in needed[-1] for source, weight in weights[name].items() if weight and source}
        needed.append((STATE, *sorted(used - {STATE})))
    needed.reverse()
    memory = max(map(len, needed))
    coefficients = np.zeros((len(steps), memory, memory + 1), np.float32)
    for index, weights in enumerate(steps):
        for row, name in enumerate(needed[index + 1]):
            for column, source in enumerate(needed[index]):
                coefficients[index, row, column] = weights[name][source]
            coefficients[index, row, memory] = weights[name][""]
    return coefficients


def step_options(scheduler: SchedulerMixin, generator: torch.Generator, eta: float) -> dict[str, Any]:
    """Return those of the options that this scheduler's `step` takes."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in known}


@contextlib.contextmanager
def as_scheduler_error(request: SchedulerRequest) -> Iterator[None]:
    """Turn an exception of a scheduler into a SchedulerStepsError."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise SchedulerStepsError(
            f"num_inference_steps is out of bounds: {request.name} can't do {request.num_inference_steps} with this "
            f"checkpoint ({type(error).__name__}: {error})."
        ) from error
