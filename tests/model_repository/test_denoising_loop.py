"""The loop without threads: who shares a forward, who goes first, who fails, and that company changes no result."""

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
from denoising_errors import (
    DeadlineError,
    DenoisingError,
    ForwardError,
    ForwardMemoryError,
    NonFiniteError,
    RequestCancelledError,
    SchedulerStepsError,
)
from denoising_job import Job
from denoising_loop import DenoisingLoop
from denoising_request import DenoisingRequest
from job_priority import priority
from loop_metrics import LoopMetrics
from noise_schedulers import NoiseSchedulers
from scheduler_steps import DiffusersSteps
from text_conditioning import Conditioning
from torch import Tensor

from tests.helpers.tiny_unet import (
    CPU,
    SCHEDULER_CONFIG,
    make_forward,
    make_request,
    make_schedulers,
    make_unet,
    reference_latents,
    relative_rms,
)

TOLERANCE = 1e-5
BUCKETS = (8, 16, 32)

EIGHT_KINDS = (
    make_request(steps=20, seed=1),
    make_request(steps=12, seed=2, scheduler="DDIMScheduler", guidance_scale=None, tokens=3),
    make_request(steps=5, seed=3, scheduler="UniPCMultistepScheduler", guidance_scale=7.0, tokens=20),
    make_request(steps=8, seed=4, scheduler="EulerAncestralDiscreteScheduler", tokens=11),
    make_request(steps=10, seed=5, scheduler="PNDMScheduler", guidance_scale=None, tokens=2),
    make_request(steps=7, seed=6, scheduler="DDIMScheduler", eta=0.5, tokens=8),
    make_request(steps=9, seed=7, scheduler="HeunDiscreteScheduler", guidance_scale=2.0, tokens=16),
    make_request(steps=1, seed=8, scheduler="EulerDiscreteScheduler", tokens=1),
)
"""Steps, scheduler, guidance and text length differ; the audio length doesn't."""


class SteppedClock:
    """Stands still but when it is moved."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class RecordingUNet:
    """Not a UNet: it notes the shape of every forward, and each row takes a second per 16 frames."""

    device = CPU

    def __init__(self, clock: SteppedClock | None = None) -> None:
        self.clock = clock or SteppedClock()
        self.forwards: list[tuple[int, int]] = []
        self.fail: Callable[[Tensor], None] = lambda _latents: None

    def project(self, generated: Tensor, prompt: Tensor, mask: Tensor) -> Conditioning:
        return Conditioning(generated, prompt, mask.float())

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        assert len(latents) == len(timesteps) == len(conditioning.prompt)
        self.forwards.append((len(latents), latents.shape[2]))
        self.clock.now += len(latents) * latents.shape[2] / 16
        self.fail(latents)
        return latents * 0.1


@pytest.fixture(scope="module")
def forward():
    return make_forward()


@pytest.fixture(scope="module")
def schedulers():
    return make_schedulers()


@pytest.fixture
def make_loop(schedulers):
    """A function that makes a loop over a UNet, and one that starts a request in it."""

    def make(unet, max_frames: int = 4096):
        clock = getattr(unet, "clock", SteppedClock())
        loop = DenoisingLoop(unet, max_frames, BUCKETS, LoopMetrics(), clock)

        def start(request: DenoisingRequest, deadline: float | None = None) -> Job:
            job = Job(request, schedulers.create(request.scheduler), deadline, arrived_s=clock())
            loop.admit(job)
            return job

        return loop, start

    return make


def run(loop: DenoisingLoop, until: Callable[[], bool] | None = None) -> int:
    """Tick until it is idle, or until the condition holds; return the number of ticks."""
    ticks = 0
    while loop.jobs and not (until and until()):
        loop.tick()
        ticks += 1
        assert ticks < 5000
    return ticks


@functools.cache
def expected(index: int) -> Tensor:
    return reference_latents(make_unet(), EIGHT_KINDS[index])


def test_eight_kinds_of_requests_share_forwards_and_each_gets_what_diffusers_gives(make_loop, forward):
    loop, start = make_loop(forward)
    jobs = [start(request) for request in EIGHT_KINDS]
    ticks = run(loop)
    assert ticks == max(job.num_forwards for job in jobs) < sum(job.num_forwards for job in jobs) / 3
    errors = [relative_rms(job.future.result(), expected(index)) for index, job in enumerate(jobs)]
    assert max(errors) <= TOLERANCE, errors


def test_the_agreement_would_not_hold_for_another_guidance(make_loop, forward):
    loop, start = make_loop(forward)
    job = start(make_request(steps=20, seed=1, guidance_scale=3.6))
    run(loop)
    assert relative_rms(job.future.result(), expected(0)) > 100 * TOLERANCE


def test_requests_joining_midway_match_diffusers(make_loop, forward):
    loop, start = make_loop(forward)
    jobs = [start(EIGHT_KINDS[0])]
    for request in EIGHT_KINDS[1:]:
        loop.tick()
        jobs.append(start(request))
    run(loop)
    errors = [relative_rms(job.future.result(), expected(index)) for index, job in enumerate(jobs)]
    assert max(errors) <= TOLERANCE, errors


def test_a_neighbour_that_is_aborted_midway_changes_nothing(make_loop, forward):
    loop, start = make_loop(forward)
    jobs = [start(request) for request in EIGHT_KINDS[:5]]
    loop.tick()
    for job in (jobs[2], jobs[3]):
        job.abort(RequestCancelledError("not wanted"))
    run(loop)
    for index in (0, 1, 4):
        assert relative_rms(jobs[index].future.result(), expected(index)) <= TOLERANCE


@pytest.mark.parametrize("max_frames", [1, 16, 48, 80])
def test_a_forward_smaller_than_a_request_changes_nothing(make_loop, forward, max_frames):
    request = make_request(prompts=2, waveforms_per_prompt=2, steps=3, scheduler="UniPCMultistepScheduler", seed=9)
    loop, start = make_loop(forward, max_frames)
    jobs = [start(request), start(EIGHT_KINDS[2]), start(EIGHT_KINDS[3])]
    run(loop)
    assert relative_rms(jobs[0].future.result(), reference_latents(make_unet(), request)) <= TOLERANCE
    assert relative_rms(jobs[1].future.result(), expected(2)) <= TOLERANCE
    assert relative_rms(jobs[2].future.result(), expected(3)) <= TOLERANCE


INTERVALS = {
    "table": make_request(steps=10, seed=11, guidance_start=0.1, guidance_end=0.4),
    "stochastic": make_request(
        steps=9, seed=12, scheduler="EulerAncestralDiscreteScheduler", guidance_start=0.1, guidance_end=0.4, tokens=3
    ),
    "two forwards per step": make_request(
        steps=6, seed=13, scheduler="HeunDiscreteScheduler", guidance_start=0.05, guidance_end=0.3, tokens=11
    ),
    "stochastic, two forwards per step": make_request(
        steps=6, seed=14, scheduler="KDPM2AncestralDiscreteScheduler", guidance_start=0.05, guidance_end=0.3
    ),
    "to the end": make_request(steps=8, seed=15, scheduler="DDIMScheduler", guidance_start=0.5, tokens=20),
    "from the beginning, several prompts": make_request(
        steps=7, seed=16, scheduler="UniPCMultistepScheduler", guidance_end=0.4, prompts=2, waveforms_per_prompt=2
    ),
    "no step": make_request(steps=5, seed=17, guidance_start=0.45, guidance_end=0.55),
    "without guidance": make_request(steps=5, seed=18, guidance_scale=None, guidance_start=0.2, guidance_end=0.8),
}
"""Requests with guidance in an interval; an early one, because late forwards of the tiny UNet change little."""


@functools.cache
def expected_in_interval(kind: str) -> Tensor:
    return reference_latents(make_unet(), INTERVALS[kind])


@pytest.mark.parametrize("max_frames", [16, 32, 48, 64, 4096])
@pytest.mark.parametrize("kind", INTERVALS)
def test_guidance_in_an_interval_is_that_of_diffusers_switched_off_outside(make_loop, forward, kind, max_frames):
    loop, start = make_loop(forward, max_frames)
    job = start(INTERVALS[kind])
    run(loop)
    assert relative_rms(job.future.result(), expected_in_interval(kind)) <= TOLERANCE


@pytest.mark.parametrize("max_frames", [80, 4096])
def test_requests_with_an_interval_and_others_share_forwards_and_change_nothing(make_loop, forward, max_frames):
    loop, start = make_loop(forward, max_frames)
    ordinary, limited = [], []
    for request, kind in zip(EIGHT_KINDS, INTERVALS, strict=True):
        ordinary.append(start(request))
        limited.append(start(INTERVALS[kind]))
        loop.tick()
    run(loop)
    references = [*map(expected, range(len(EIGHT_KINDS))), *map(expected_in_interval, INTERVALS)]
    results = [job.future.result() for job in ordinary + limited]
    errors = list(map(relative_rms, results, references))
    assert max(errors) <= TOLERANCE, errors


@pytest.mark.parametrize("end", ["guidance_start", "guidance_end"])
@pytest.mark.parametrize("forwards", [-1, 1])
@pytest.mark.parametrize("kind", ["table", "stochastic", "two forwards per step", "stochastic, two forwards per step"])
def test_the_agreement_would_not_hold_for_an_interval_that_is_one_forward_off(schedulers, kind, end, forwards):
    request = INTERVALS[kind]
    moved = getattr(request, end) + forwards / len(schedulers.create(request.scheduler).timesteps)
    other = reference_latents(make_unet(), dataclasses.replace(request, **{end: moved}))
    assert relative_rms(other, expected_in_interval(kind)) > 5 * TOLERANCE


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        ("table", [1] + [2] * 3 + [1] * 6),
        ("stochastic", [1] + [2] * 2 + [1] * 6),
        ("two forwards per step", [1] + [2] * 2 + [1] * 8),
        ("to the end", [1] * 4 + [2] * 4),
        ("from the beginning, several prompts", [8] * 2 + [4] * 5),
        ("no step", [1] * 5),
        ("without guidance", [1] * 5),
    ],
)
def test_outside_of_the_interval_a_waveform_has_one_row(make_loop, kind, rows):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    start(INTERVALS[kind])
    run(loop)
    assert unet.forwards == [(count, 16) for count in rows]


def test_an_end_of_the_interval_between_two_steps_is_met_in_spite_of_rounding():
    for count in (5, 10, 20, 40, 50, 100):
        for index in range(count):
            start, end = (float(f"{number / count:g}") for number in (index, index + 1))
            request = make_request(guidance_start=start, guidance_end=end)
            assert [forward for forward in range(count) if request.is_guided(forward, count)] == [index]


def test_what_a_request_still_needs_is_told_by_its_rows(make_loop):
    unet = RecordingUNet()  # a row takes a second
    loop, start = make_loop(unet)
    job = start(make_request(steps=10, guidance_start=0.5))
    for forwards, remaining_s in ((1, 14), (5, 10), (6, 8), (9, 2)):
        run(loop, lambda forwards=forwards: job.forwards_done == forwards)
        assert priority(job, now=28.0)[1] == pytest.approx(28 / remaining_s)


def test_joining_between_the_parts_of_a_forward_changes_nothing(make_loop, forward):
    request = make_request(waveforms_per_prompt=3, steps=3, seed=9)
    loop, start = make_loop(forward, max_frames=16 * 4)
    job = start(request)
    loop.tick()
    assert 0 < job.rows_done < request.num_rows
    start(EIGHT_KINDS[2])
    run(loop)
    assert relative_rms(job.future.result(), reference_latents(make_unet(), request)) <= TOLERANCE


def test_no_forward_is_larger_than_the_budget(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet, max_frames=100)
    for frames in (16, 16, 16, 30, 250):
        start(make_request(frames=frames, waveforms_per_prompt=2))
    run(loop)
    assert max(rows * frames for rows, frames in unet.forwards if frames < 250) <= 100
    assert {rows for rows, frames in unet.forwards if frames == 250} == {1}
    assert (6, 16) in unet.forwards
    assert (3, 30) in unet.forwards


# DPMSolverSDEScheduler asks torchsde for an interval that ends a rounding error behind the last time.
ignore_torchsde = pytest.mark.filterwarnings("ignore:Should have tb<=t1:UserWarning")


@ignore_torchsde
@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (scheduler, steps)
        for scheduler in NoiseSchedulers(SCHEDULER_CONFIG).names
        for steps in (1, 4, 7, 20)
        if (scheduler, steps) != ("PNDMScheduler", 1)  # which it can't do
    ],
)
def test_steps_rise_one_by_one_to_what_was_asked_for_whatever_a_step_takes(make_loop, scheduler, steps):
    loop, start = make_loop(RecordingUNet())
    job = start(make_request(steps=steps, scheduler=scheduler))
    seen = [job.steps_done]
    while loop.jobs:
        loop.tick()
        seen.append(job.steps_done)
    assert len(seen) == job.num_forwards + 1
    assert sorted(set(seen)) == list(range(steps + 1)), "none is left out"
    assert seen == sorted(seen)
    assert loop._metrics.take().steps == steps


@ignore_torchsde
@pytest.mark.parametrize("scheduler", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"])
def test_a_step_of_two_forwards_is_done_after_both(make_loop, scheduler):
    loop, start = make_loop(RecordingUNet())
    job = start(make_request(steps=20, scheduler=scheduler))
    assert job.num_forwards == 2 * 20 - 1, "the last step takes one"
    for forwards in range(1, job.num_forwards):
        loop.tick()
        assert job.steps_done == forwards // 2
    loop.tick()
    assert job.steps_done == 20


def test_different_lengths_never_share_a_forward(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    jobs = [start(make_request(frames=16, steps=6)), start(make_request(frames=17, steps=6))]
    loop.tick()
    loop.tick()
    assert [job.forwards_done for job in jobs] == [1, 1], "each has begun"
    run(loop)
    assert sorted(unet.forwards) == [(2, 16)] * 6 + [(2, 17)] * 6


def test_the_one_with_less_to_do_goes_first(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    start(make_request(frames=17, steps=20))
    short = start(make_request(frames=16, steps=10))
    run(loop, short.future.done)
    assert unet.forwards.count((2, 17)) <= 2


def test_the_one_that_has_waited_longer_goes_first(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    first = start(make_request(frames=16, steps=20))
    run(loop, lambda: first.forwards_done == 10)
    second = start(make_request(frames=17, steps=10))
    run(loop, first.future.done)
    assert 1 <= second.forwards_done <= 5


@pytest.mark.parametrize("forwards", [0, 1, 50, 100, 150, 190, 195, 199])
def test_no_request_falls_further_behind_an_equal_share_than_all_of_its_own_time(make_loop, forwards):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    long = start(make_request(frames=160, steps=200))
    run(loop, lambda: long.forwards_done == forwards)
    before = unet.clock.now
    short = start(make_request(frames=16, steps=40))
    run(loop, short.future.done)
    solo, one_forward_of_the_other = 40 * 2, 20
    assert unet.clock.now - before <= 2 * 2 * solo + 2 * one_forward_of_the_other


def test_a_short_request_gets_half_of_the_time_beside_one_ten_times_as_long(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    start(make_request(frames=160, steps=200))
    for _ in range(5):
        loop.tick()
    before = unet.clock.now
    short = start(make_request(frames=16, steps=40))
    run(loop, short.future.done)
    solo = 40 * 2
    one_forward_of_the_other = 20
    assert unet.clock.now - before <= 2 * solo + 2 * one_forward_of_the_other


def test_a_stream_of_short_requests_does_not_starve_a_long_one(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    long = start(make_request(frames=160, steps=20))
    shorts = [start(make_request(frames=16, steps=3)) for _ in range(3)]
    while not long.future.done():
        loop.tick()
        assert len(unet.forwards) < 500, "it starves"
        for index, short in enumerate(shorts):
            if short.future.done():
                shorts[index] = start(make_request(frames=16, steps=3))
    solo = 20 * 20
    # Four requests, each with an equal claim; two forwards for what was under way at both ends.
    assert unet.clock.now <= 4 * solo + 2 * 20


def test_a_newcomer_has_no_claim_on_the_time_before_it_came(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    first = start(make_request(frames=16, steps=50))
    for _ in range(25):
        loop.tick()
    start(make_request(frames=17, steps=50))
    for _ in range(20):
        loop.tick()
    assert first.forwards_done >= 25 + 9


def test_text_is_padded_to_few_sizes(make_loop):
    class TokenCountingUNet(RecordingUNet):
        tokens: set[int] = set()  # noqa: RUF012

        def __call__(self, latents, timesteps, conditioning):
            self.tokens.add(conditioning.tokens)
            return super().__call__(latents, timesteps, conditioning)

    unet = TokenCountingUNet()
    loop, start = make_loop(unet)
    for tokens in range(1, 33):
        start(make_request(tokens=tokens, steps=1))
        run(loop)
    assert unet.tokens == set(BUCKETS)


def test_a_request_whose_time_is_up_finishes_after_the_present_forward(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    late, other = start(make_request(steps=10), deadline=9.0), start(make_request(steps=10))
    run(loop, late.future.done)
    with pytest.raises(DeadlineError, match="the time was up after 3 of 10 steps"):
        late.future.result()
    assert other.forwards_done == 4, "the other one goes on, in the same tick"
    assert unet.forwards == [(4, 16)] * 3 + [(2, 16)]


def test_a_cancelled_request_frees_its_rows_within_one_forward(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    cancelled, other = start(make_request(steps=10)), start(make_request(steps=10))
    loop.tick()
    cancelled.abort(RequestCancelledError("cancelled after 1 of 10 steps."))
    assert loop.tick() == [cancelled]
    assert unet.forwards == [(4, 16), (2, 16)]
    with pytest.raises(RequestCancelledError):
        cancelled.future.result()
    run(loop)
    assert other.future.result() is not None


def test_latents_that_are_not_finite_fail_their_own_request_alone(make_loop, forward):
    loop, start = make_loop(forward)
    poisoned = make_request(steps=3, seed=1)
    poisoned.prompt_embeds[0, 0, 0] = float("inf")
    jobs = [start(poisoned), start(EIGHT_KINDS[2])]
    run(loop)
    with pytest.raises(NonFiniteError, match=r"DPMSolverMultistepScheduler with 3 steps gave latents .* not finite"):
        jobs[0].future.result()
    assert relative_rms(jobs[1].future.result(), expected(2)) <= TOLERANCE


def test_a_scheduler_that_fails_fails_its_own_request_alone(make_loop, forward, monkeypatch):
    loop, start = make_loop(forward)
    jobs = [start(EIGHT_KINDS[3]), start(EIGHT_KINDS[2])]
    assert isinstance(jobs[0].steps, DiffusersSteps)
    loop.tick()
    monkeypatch.setattr(jobs[0].steps._scheduler, "step", lambda *_args, **_options: 1 / 0)
    run(loop)
    with pytest.raises(SchedulerStepsError, match=r"EulerAncestralDiscreteScheduler can't do 8 .*ZeroDivisionError"):
        jobs[0].future.result()
    assert relative_rms(jobs[1].future.result(), expected(2)) <= TOLERANCE


def too_many_rows(limit: int, error: Exception) -> Callable[[Tensor], None]:
    def fail(latents: Tensor) -> None:
        if len(latents) > limit:
            raise error

    return fail


def test_out_of_memory_is_tried_again_with_half_of_the_rows_and_remembered(make_loop):
    unet = RecordingUNet()
    unet.fail = too_many_rows(2, torch.OutOfMemoryError("CUDA out of memory"))
    loop, start = make_loop(unet)
    jobs = [start(make_request(steps=2, seed=seed)) for seed in range(4)]
    run(loop)
    assert all(job.future.exception() is None for job in jobs)
    assert [rows for rows, _ in unet.forwards[:7]] == [8, 4, 2, 2, 4, 2, 2]
    assert {rows for rows, _ in unet.forwards[7:]} == {2}


def test_out_of_memory_with_a_single_row_fails_that_request_with_advice(make_loop):
    unet = RecordingUNet()

    def fail(latents: Tensor) -> None:
        if latents.shape[2] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")

    unet.fail = fail
    loop, start = make_loop(unet)
    large, small = start(make_request(frames=40, steps=2)), start(make_request(steps=2))
    run(loop)
    with pytest.raises(ForwardMemoryError, match="memory isn't enough for a single row of this length: ask for less"):
        large.future.result()
    assert small.future.exception() is None


def test_a_forward_that_fails_fails_only_the_request_that_caused_it(make_loop):
    unet = RecordingUNet()

    def fail(latents: Tensor) -> None:
        if (latents.abs() > 1e6).any():
            raise RuntimeError("a bad row")

    unet.fail = fail
    loop, start = make_loop(unet)
    jobs = [start(make_request(steps=3, seed=seed)) for seed in range(5)]
    with torch.inference_mode():
        jobs[3].latents.mul_(1e9)
    run(loop)
    with pytest.raises(ForwardError, match=r"the UNet failed \(RuntimeError: a bad row\)"):
        jobs[3].future.result()
    assert all(job.future.exception() is None for job in jobs if job is not jobs[3])


def test_what_happens_is_counted(make_loop):
    unet = RecordingUNet()
    loop, start = make_loop(unet)
    start(make_request(steps=2))
    start(make_request(steps=3), deadline=5.0)
    run(loop)
    counts = loop._metrics.take()
    assert counts.rows_of_forwards == [4, 4]
    assert counts.seconds_of_forwards == [4.0, 4.0]
    assert counts.steps == 4
    assert counts.requests == {("finished", "ok"): 1, ("deadline", "DeadlineError"): 1}


def test_every_error_has_a_code_that_triton_knows():
    def subclasses(cls: type) -> set[type]:
        return {cls}.union(*map(subclasses, cls.__subclasses__()))

    assert {error.code for error in subclasses(DenoisingError)} <= {
        "INVALID_ARG",
        "INTERNAL",
        "UNAVAILABLE",
        "CANCELLED",
    }
    assert DeadlineError("x").message == "[DEADLINE] x"
