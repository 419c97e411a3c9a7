"""Steps of every scheduler, against diffusers' own class; those that are weighted sums become tables."""

import dataclasses
import inspect

import diffusers
import numpy as np
import pytest
import scheduler_steps
import step_table
import torch
from denoising_errors import SchedulerStepsError, UnknownSchedulerError
from denoising_request import SchedulerRequest
from noise_schedulers import NoiseSchedulers
from scheduler_names import ALIASES
from scheduler_steps import DiffusersSteps, LinearSteps, Steps

from tests.helpers.tiny_unet import SCHEDULER_CONFIG, make_schedulers, relative_rms

SHAPE = (1, 2, 4, 16)
SEED = 5
TOLERANCE = 1e-4
NAMES = NoiseSchedulers(SCHEDULER_CONFIG).names
CASES = {
    **{name: (name, {}) for name in NAMES},
    **{alias: choice for alias, choice in ALIASES.items() if choice[1]},
    # With skip_prk_steps, as the official checkpoints have it, PNDM can do any number of steps.
    "pndm-without-prk": ("PNDMScheduler", {"skip_prk_steps": True}),
}
STOCHASTIC = {
    "DDPMScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "dpm2-a-karras",
    "dpm++2m-sde",
    "dpm++2m-sde-karras",
    "dpm++sde-karras",
}
NOT_LINEAR = [
    *((name, {"clip_sample": True}) for name in ("DDIMScheduler", "HeunDiscreteScheduler")),
    *(
        (name, {"thresholding": True})
        for name in (
            "DDIMScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "UniPCMultistepScheduler",
        )
    ),
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 50.0}),
]

# DPMSolverSDEScheduler asks torchsde for an interval that ends a rounding error behind the last time.
ignore_torchsde = pytest.mark.filterwarnings("ignore:Should have tb<=t1:UserWarning")


def wanted(name: str, options: dict, steps: int, *, eta: float = 0.0, seed: int = SEED) -> SchedulerRequest:
    return SchedulerRequest(name, tuple(options.items()), steps, eta, seed)


def own_scheduler(request: SchedulerRequest):
    scheduler_class = getattr(diffusers, request.name)
    noise = {"noise_sampler_seed": request.seed} if request.name == "DPMSolverSDEScheduler" else {}
    scheduler = scheduler_class.from_config(SCHEDULER_CONFIG, **dict(request.options), **noise)
    scheduler.set_timesteps(request.num_inference_steps)
    return scheduler


def fake_unet(scaled: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.tanh(1.3 * scaled + 0.001 * float(timestep))


def own_latents(request: SchedulerRequest) -> torch.Tensor:
    scheduler = own_scheduler(request)
    generator = torch.Generator().manual_seed(request.seed)
    known = inspect.signature(scheduler.step).parameters
    options = {key: value for key, value in {"generator": generator, "eta": request.eta}.items() if key in known}
    latents = torch.randn(SHAPE, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise_pred = fake_unet(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(noise_pred, timestep, latents, **options).prev_sample
    return latents


def latents_of(steps: Steps) -> torch.Tensor:
    latents = steps.noise(SHAPE)
    state = torch.cat([latents.reshape(1, -1), torch.zeros(steps.memory - 1, latents.numel())])
    for forward, timestep in enumerate(steps.timesteps):
        noise_pred = fake_unet(latents * steps.input_scale(forward), timestep)
        if isinstance(steps, DiffusersSteps):
            latents = steps.step(forward, noise_pred, latents)
        else:
            weights = torch.from_numpy(steps.table.coefficients[forward])
            state = weights @ torch.cat([state, noise_pred.reshape(1, -1)])
            latents = state[0].reshape(SHAPE)
    return latents


def error_of(request: SchedulerRequest) -> float:
    return relative_rms(latents_of(make_schedulers().create(request)), own_latents(request))


@ignore_torchsde
@pytest.mark.parametrize(
    ("case", "steps"),
    [(case, steps) for case in CASES for steps in (1, 4, 20) if (case, steps) != ("PNDMScheduler", 1)],
)
def test_steps_agree_with_those_of_diffusers(case, steps):
    assert error_of(wanted(*CASES[case], steps)) <= TOLERANCE


@ignore_torchsde
@pytest.mark.parametrize("steps", [4, 20])
def test_all_schedulers_but_the_stochastic_ones_become_tables(steps):
    made = {case: make_schedulers().create(wanted(*choice, steps)) for case, choice in CASES.items()}
    assert {case for case in made if isinstance(made[case], DiffusersSteps)} == STOCHASTIC
    assert {case for case in made if isinstance(made[case], LinearSteps)} == set(CASES) - STOCHASTIC


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_ddim_is_not_linear_with_noise_of_its_own(steps):
    request = wanted("DDIMScheduler", {}, steps, eta=0.5)
    assert isinstance(make_schedulers().create(request), DiffusersSteps)
    assert error_of(request) <= TOLERANCE
    assert relative_rms(own_latents(request), own_latents(dataclasses.replace(request, eta=0.0))) > 100 * TOLERANCE


@pytest.mark.parametrize(("name", "options"), NOT_LINEAR)
@pytest.mark.parametrize("steps", [4, 20])
def test_a_scheduler_that_clips_keeps_diffusers_steps(name, options, steps):
    request = wanted(name, options, steps)
    assert isinstance(make_schedulers().create(request), DiffusersSteps)
    assert error_of(request) <= TOLERANCE
    # It does clip here: otherwise this wouldn't test anything.
    assert relative_rms(own_latents(request), own_latents(wanted(name, {}, steps))) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
        ("DEISMultistepScheduler", {"solver_order": 3}),
        ("DDIMScheduler", {"prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_other_linear_options_become_tables_that_agree(name, options):
    request = wanted(name, options, 7)
    assert isinstance(make_schedulers().create(request), LinearSteps)
    assert error_of(request) <= TOLERANCE
    assert relative_rms(own_latents(request), own_latents(wanted(name, {}, 7))) > 10 * TOLERANCE


def test_a_scheduler_that_remembers_more_than_there_is_room_for_keeps_diffusers_steps(monkeypatch):
    request = wanted("UniPCMultistepScheduler", {}, 6)
    assert make_schedulers().create(request).memory == 4
    monkeypatch.setattr(step_table, "MAX_MEMORY", 3)
    assert isinstance(make_schedulers().create(request), DiffusersSteps)
    assert error_of(request) <= TOLERANCE


@pytest.mark.parametrize("forward", range(4))
@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_step_that_is_off_by_one_percent_is_noticed(name, forward):
    request = wanted(name, {}, 4)
    table = make_schedulers().create(request).table
    coefficients = table.coefficients.copy()
    coefficients[forward, 0] *= 1.01
    broken = LinearSteps(dataclasses.replace(table, coefficients=coefficients), request)
    assert relative_rms(latents_of(broken), own_latents(request)) > TOLERANCE


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_requests_that_differ_in_their_seed_share_the_search_for_a_table(name, monkeypatch):
    searched = []

    def make_step_table(scheduler, request):
        searched.append(request.num_inference_steps)
        return original(scheduler, request)

    original = scheduler_steps.make_step_table
    monkeypatch.setattr(scheduler_steps, "make_step_table", make_step_table)
    schedulers = make_schedulers()
    made = [schedulers.create(wanted(name, {}, steps, seed=seed)) for steps in (4, 5) for seed in (1, 2)]
    assert searched == [4, 5]
    noises = [steps.noise(SHAPE) for steps in made]
    assert not torch.equal(noises[0], noises[1])
    assert torch.equal(noises[0], noises[2])


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_requests_that_run_at_the_same_time_leave_each_other_alone(name):
    request, other = wanted(name, {}, 4), wanted(name, {}, 4, seed=SEED + 1)
    schedulers = make_schedulers()
    first = schedulers.create(request)
    latents_of(schedulers.create(other))
    assert relative_rms(latents_of(first), own_latents(request)) <= TOLERANCE


def test_too_few_steps_are_refused_by_the_inputs_name():
    with pytest.raises(SchedulerStepsError) as caught:
        make_schedulers().create(wanted("PNDMScheduler", {}, 1))
    assert caught.value.message.startswith(
        "[INVALID_ARG] num_inference_steps is out of bounds: PNDMScheduler can't do 1 with this checkpoint"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("NoScheduler", {}, "scheduler must be one of DDIMScheduler, .*, got 'NoScheduler'"),
        ("FlowMatchEulerDiscreteScheduler", {}, "got 'FlowMatchEulerDiscreteScheduler'"),
        ("DDIMScheduler", {"use_karras_sigmas": True}, "DDIMScheduler has no option 'use_karras_sigmas'; it has .*eta"),
    ],
)
def test_an_unknown_scheduler_or_option_is_refused(name, options, message):
    with pytest.raises(UnknownSchedulerError, match=message):
        make_schedulers().create(wanted(name, options, 4))


@ignore_torchsde
@pytest.mark.parametrize("case", CASES)
def test_noise_timesteps_and_input_scales_are_those_of_diffusers(case):
    request = wanted(*CASES[case], 4)
    steps, scheduler = make_schedulers().create(request), own_scheduler(request)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(SEED)) * scheduler.init_noise_sigma
    torch.testing.assert_close(steps.noise(SHAPE), noise)
    np.testing.assert_array_equal(steps.timesteps, scheduler.timesteps.float().numpy())
    blank = torch.zeros(SHAPE)
    for forward, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.scale_model_input(torch.ones(()), timestep)
        assert steps.input_scale(forward) == pytest.approx(float(expected), rel=1e-6)
        # The scale is that of a scheduler that has come this far.
        scheduler.step(blank, timestep, blank)
        if isinstance(steps, DiffusersSteps):
            steps.step(forward, blank, blank)


def test_noise_is_noticed_however_large_the_weights_beside_it():
    request = SchedulerRequest("EulerAncestralDiscreteScheduler", (("rescale_betas_zero_snr", True),), 2, 0.0, 5)
    assert isinstance(make_schedulers().create(request), DiffusersSteps)
