"""How one request's latents move at each step: by a table for all requests at once, or by diffusers' own class.

A scheduler whose steps are weighted sums becomes a StepTable. The rest, such as those that draw noise or clip, keep
diffusers' class.
"""

import functools
from dataclasses import replace

import torch
from denoising_request import SchedulerRequest
from diffusers import SchedulerMixin
from noise_schedulers import NoiseSchedulers
from step_table import StepTable, as_scheduler_error, make_step_table, step_options
from torch import Tensor


class DiffusersSteps:
    """A scheduler of diffusers that does its own steps.

    Attributes:
        timesteps: float32 [forwards].
        init_noise_sigma: What the starting noise is multiplied by.
    """

    memory = 1

    def __init__(self, scheduler: SchedulerMixin, request: SchedulerRequest) -> None:
        with as_scheduler_error(request):
            scheduler.set_timesteps(request.num_inference_steps)
        self._scheduler, self._request = scheduler, request
        self._timesteps = scheduler.timesteps
        self.timesteps = self._timesteps.float().numpy()
        self.init_noise_sigma = float(scheduler.init_noise_sigma)
        self._generator = torch.Generator("cpu").manual_seed(request.seed)
        self._options = step_options(scheduler, self._generator, request.eta)

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Return the starting noise, float32 on the CPU; the scheduler's own noise follows from the same generator."""
        return initial_noise(shape, self._generator) * self.init_noise_sigma

    def input_scale(self, forward: int) -> float:
        """Return what the latents are multiplied by before the UNet sees them."""
        with as_scheduler_error(self._request):
            return float(self._scheduler.scale_model_input(torch.ones(()), self._timesteps[forward]))

    def step(self, forward: int, noise_pred: Tensor, latents: Tensor) -> Tensor:
        """Return the next latents; the steps must be done in their order."""
        with as_scheduler_error(self._request):
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
    """

    def __init__(self, schedulers: NoiseSchedulers) -> None:
        self._schedulers = schedulers
        self._table = functools.lru_cache(maxsize=128)(self._make_table)

    def create(self, request: SchedulerRequest) -> Steps:
        """Return the steps of `request`.

        Raises:
            UnknownSchedulerError: There is no such class or option.
            SchedulerStepsError: It can't do so many steps.
        """
        table = self._table(replace(request, seed=0))
        if table is not None:
            return LinearSteps(table, request)
        return DiffusersSteps(self._scheduler(request), request)

    def _make_table(self, request: SchedulerRequest) -> StepTable | None:
        return make_step_table(self._scheduler(request), request)

    def _scheduler(self, request: SchedulerRequest) -> SchedulerMixin:
        return self._schedulers.create(request.name, dict(request.options), request.seed)


def initial_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return float32 noise, drawn on the CPU so that a seed means the same on every device."""
    return torch.randn(shape, generator=generator, dtype=torch.float32)
