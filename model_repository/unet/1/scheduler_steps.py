"""How one request's latents move at each step.

Most of diffusers' deterministic schedulers are linear multistep methods: the next latents, and whatever the scheduler
remembers for later, are weighted sums of the present latents, the noise prediction and what it remembers. For these the
weights are found once, by letting diffusers' own class do its steps on unit vectors, and are checked on random numbers
in the same run. The rest, such as those that draw noise or clip, keep diffusers' class.
"""

import contextlib
import functools
import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from denoising_errors import InvalidRequestError, SchedulerStepsError
from diffusers import SchedulerMixin
from noise_schedulers import NoiseSchedulers
from torch import Tensor

MAX_MEMORY = 6
"""Tensors of a request's state, its latents included: DPM++ needs 2, UniPC 4."""

MAX_OPTION = 1000
"""Largest number among the options: that of the training timesteps."""

NUM_WITNESSES = 8
"""Random numbers that go through the scheduler beside the unit vectors, to see whether it is linear."""

STATE = "latents"


@dataclass(frozen=True)
class SchedulerRequest:
    """Which steps are wanted.

    Attributes:
        name: A class of diffusers.
        options_json: What differs from the checkpoint's scheduler configuration.
        num_inference_steps: At least 1.
        eta: DDIM's noise, 0 to 1.
        seed: Of the noise that a scheduler draws.
    """

    name: str
    options_json: str
    num_inference_steps: int
    eta: float
    seed: int


@dataclass(frozen=True)
class StepTable:
    """A linear scheduler, worked out.

    Attributes:
        timesteps: float32 [forwards], what the UNet is told.
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


class DiffusersSteps:
    """A scheduler of diffusers that does its own steps.

    Attributes:
        timesteps: float32 [forwards].
        init_noise_sigma: What the starting noise is multiplied by.
    """

    memory = 1

    def __init__(self, scheduler: SchedulerMixin, request: SchedulerRequest, device: torch.device) -> None:
        with blame(request):
            scheduler.set_timesteps(request.num_inference_steps, device=device)
        self._scheduler, self._request = scheduler, request
        self._timesteps = scheduler.timesteps
        self.timesteps = self._timesteps.float().cpu().numpy()
        self.init_noise_sigma = float(scheduler.init_noise_sigma)
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        self._options = _step_options(scheduler, self._generator, request.eta)

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Return the starting noise, float32 on the CPU; the scheduler's own noise follows from the same generator."""
        return initial_noise(shape, self._generator) * self.init_noise_sigma

    def input_scale(self, forward: int) -> float:
        """Return what the latents are multiplied by before the UNet sees them."""
        with blame(self._request):
            return float(self._scheduler.scale_model_input(torch.ones(()), self._timesteps[forward]))

    def step(self, forward: int, noise_pred: Tensor, latents: Tensor) -> Tensor:
        """Return the next latents; the steps must be done in their order."""
        with blame(self._request):
            return self._scheduler.step(
                noise_pred, self._timesteps[forward], latents, **self._options, return_dict=False
            )[0]


class LinearSteps:
    """A scheduler whose steps are in a StepTable; the loop does them, for all requests at once."""

    def __init__(self, table: StepTable, request: SchedulerRequest) -> None:
        self.table = table
        self._request = request
        self.timesteps = table.timesteps
        self.memory = table.memory

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Return the starting noise, float32 on the CPU."""
        return (
            initial_noise(shape, torch.Generator("cpu").manual_seed(self._request.seed)) * self.table.init_noise_sigma
        )

    def input_scale(self, forward: int) -> float:
        """Return what the latents are multiplied by before the UNet sees them."""
        return float(self.table.input_scales[forward])


Steps = DiffusersSteps | LinearSteps


class SchedulerSteps:
    """Makes the steps of requests; tables are made once and kept.

    Args:
        schedulers: The checkpoint's.
        device: Where the latents are.
    """

    def __init__(self, schedulers: NoiseSchedulers, device: torch.device) -> None:
        self._schedulers, self._device = schedulers, device
        self._table = functools.lru_cache(maxsize=128)(self._make_table)

    def create(self, request: SchedulerRequest) -> Steps:
        """Return the steps of `request`.

        Raises:
            UnknownSchedulerError: There is no such class or option.
            SchedulerStepsError: It can't do so many steps.
        """
        table = self._table(request.name, request.options_json, request.num_inference_steps, request.eta)
        if table is not None:
            return LinearSteps(table, request)
        return DiffusersSteps(self._scheduler(request), request, self._device)

    def _make_table(self, name: str, options_json: str, num_inference_steps: int, eta: float) -> StepTable | None:
        request = SchedulerRequest(name, options_json, num_inference_steps, eta, seed=0)
        return make_step_table(self._scheduler(request), request)

    def _scheduler(self, request: SchedulerRequest) -> SchedulerMixin:
        return self._schedulers.create(request.name, _options(request.options_json), request.seed)


def _options(options_json: str) -> dict[str, Any]:
    """Read a scheduler's options; numbers are bounded, since some are the size of what it allocates."""
    try:
        options = json.loads(options_json)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"scheduler_options must be JSON: {error}.") from None
    if not isinstance(options, dict) or not all(map(_is_plain, options.values())):
        raise InvalidRequestError(
            "scheduler_options must be a JSON object whose values are true, false, text, or numbers from "
            f"{-MAX_OPTION} to {MAX_OPTION}."
        )
    return options


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | str) or (isinstance(value, int | float) and abs(value) <= MAX_OPTION)


def initial_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return float32 noise, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)


@contextlib.contextmanager
def blame(request: SchedulerRequest) -> Iterator[None]:
    """Turn whatever a scheduler stumbles over into a SchedulerStepsError."""
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise SchedulerStepsError(
            f"num_inference_steps is out of bounds: {request.name} can't do {request.num_inference_steps} with this "
            f"checkpoint ({type(error).__name__}: {error})."
        ) from error


def make_step_table(scheduler: SchedulerMixin, request: SchedulerRequest) -> StepTable | None:
    """Find the weights of every step of `scheduler`, a new one.

    Returns:
        None where the steps aren't weighted sums, or where it would have to remember more than MAX_MEMORY tensors.

    Raises:
        SchedulerStepsError: It can't do so many steps.
    """
    with blame(request):
        scheduler.set_timesteps(request.num_inference_steps)
        generator = torch.Generator("cpu").manual_seed(0)
        options = _step_options(scheduler, generator, request.eta)
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


Weights = dict[str, dict[str, float]]
"""Of one step: for each tensor of the next state, the weight of each present one and of the noise prediction, ''."""


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


def _step_options(scheduler: SchedulerMixin, generator: torch.Generator, eta: float) -> dict[str, Any]:
    """Return those of the options that this scheduler's `step` takes."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in known}
