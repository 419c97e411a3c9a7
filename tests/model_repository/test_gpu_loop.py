"""The loop on GPUs that are simulated: no tick waits for the device, none mixes devices, and results are diffusers'.

What tests/helpers/simulated_cuda.py can't show, a real GPU must: speed, and what kernels compute there.
"""

from collections import Counter
from collections.abc import Callable, Iterator

import denoising_batch
import denoising_loop
import frame_budget
import pytest
import tick_graphs
import torch
from denoising_errors import DeviceLostError, ForwardMemoryError, RequestCancelledError, StageError
from denoising_job import Job
from denoising_loop import DenoisingLoop
from denoising_request import DenoisingRequest
from loop_metrics import LoopMetrics
from noise_schedulers import NoiseSchedulers
from scheduler_steps import SchedulerSteps
from tick_graphs import TickGraphs
from unet_forward import UNetForward

from tests.helpers.simulated_cuda import CudaTensor, Simulator, simulated_cuda
from tests.helpers.tiny_unet import SCHEDULER_CONFIG, SHALLOW, make_request, make_unet, reference_latents, relative_rms

TOLERANCE = 1e-5
BUCKETS = (8, 16, 32)
ROWS = (1, 2, 4, 8, 32)
KEY = (8, 16, 16, 8)
"""Channels, frames and bins of the latents of `make_request`, and GPT-2's vectors."""
SCHEDULERS = sorted({*NoiseSchedulers(SCHEDULER_CONFIG).names} - {"DPMSolverSDEScheduler"})
"""All but the one whose noise is drawn by the GPU's own generator."""


@pytest.fixture(autouse=True)
def _no_inference_mode(monkeypatch) -> None:
    """Inference mode knows of no tensors that stand for others."""
    for owner, name in (
        (DenoisingLoop, "admit"),
        (DenoisingLoop, "tick"),
        (DenoisingLoop, "use_idle_time"),
        (UNetForward, "project"),
        (UNetForward, "__call__"),
    ):
        monkeypatch.setattr(owner, name, torch.no_grad()(getattr(owner, name).__wrapped__))


@pytest.fixture
def gpu(monkeypatch) -> Iterator[Simulator]:
    with simulated_cuda(monkeypatch) as simulator:
        yield simulator


@pytest.fixture
def two_gpus(monkeypatch) -> Iterator[Simulator]:
    with simulated_cuda(monkeypatch, num_devices=2) as simulator:
        yield simulator


class Loop:
    """A loop over a tiny UNet on a simulated GPU."""

    def __init__(self, *, graphs: bool = False, device: int = 0, max_frames: int = 16384) -> None:
        place = torch.device("cuda", device)
        torch.cuda.set_device(place)
        self.unet = UNetForward(make_unet(**SHALLOW), place, 512)
        self.schedulers = SchedulerSteps(NoiseSchedulers(SCHEDULER_CONFIG))
        self.reports: list[str] = []
        self.graphs = (
            TickGraphs(self.unet.forward_at, torch.float32, ROWS, max_frames, self.reports.append, [(KEY, 16)])
            if graphs
            else None
        )
        self.metrics = LoopMetrics()
        self.loop = DenoisingLoop(self.unet, max_frames, BUCKETS, self.metrics, graphs=self.graphs)
        self.use_idle_time()

    def use_idle_time(self) -> int:
        times = 0
        while self.loop.use_idle_time():
            times += 1
        return times

    def start(self, request: DenoisingRequest) -> Job:
        job = Job(request, self.schedulers.create(request.scheduler))
        self.loop.admit(job)
        return job

    def run(self, until: Callable[[], bool] | None = None) -> int:
        ticks = 0
        while not (self.loop.is_idle or (until and until())):
            self.loop.tick()
            ticks += 1
            assert ticks < 1000
        return ticks


def error_of(job: Job) -> float:
    return relative_rms(job.future.result(0), reference_latents(make_unet(**SHALLOW), job.request))


def waits(events: Counter[str]) -> dict[str, int]:
    return {kind: events[kind] for kind in ("copy", "wait")}


NONE = {"copy": 0, "wait": 0}


@pytest.mark.parametrize("graphs", [False, True])
def test_all_schedulers_at_once_give_on_a_gpu_what_diffusers_gives(gpu, graphs):
    loop = Loop(graphs=graphs)
    jobs = [loop.start(make_request(steps=4, scheduler=name, seed=seed)) for seed, name in enumerate(SCHEDULERS)]
    gpu.take()
    loop.run()
    assert (gpu.take()["replay"] > 0) == graphs
    errors = {job.request.scheduler.name: error_of(job) for job in jobs}
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("requests", [1, 4])
def test_neither_a_tick_nor_an_admission_waits_for_the_gpu(gpu, requests, graphs):
    loop = Loop(graphs=graphs)
    gpu.take()
    jobs = [loop.start(make_request(steps=6, seed=seed)) for seed in range(requests)]
    assert waits(gpu.take()) == NONE
    for tick in range(6):
        loop.loop.tick()
        events = gpu.take()
        assert waits(events) == NONE, tick
        assert events["event wait"] <= 3
        if graphs:
            assert events["replay"] == 1
            assert (1 <= tick < 5 and events["kernel"] == 0) or tick in (0, 5)
    loop.run()
    assert max(map(error_of, jobs)) <= TOLERANCE


def test_who_comes_and_goes_makes_nobody_wait(gpu):
    loop = Loop(graphs=True)
    jobs = [loop.start(make_request(steps=3 + 2 * seed, seed=seed)) for seed in range(3)]
    gpu.take()
    while not loop.loop.is_idle:
        loop.loop.tick()
        if len(jobs) < 7:
            jobs.append(loop.start(make_request(steps=2 + len(jobs) % 3, seed=len(jobs), guidance_scale=None)))
    assert waits(gpu.take()) == NONE
    assert max(map(error_of, jobs)) <= TOLERANCE


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("scheduler", ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
def test_guidance_in_an_interval_makes_nobody_wait_and_changes_nothing(gpu, scheduler, graphs):
    loop = Loop(graphs=graphs)
    gpu.take()
    jobs = [
        loop.start(make_request(steps=6, scheduler=scheduler, guidance_start=0.3, guidance_end=0.7)),
        loop.start(make_request(steps=7, seed=1)),
        loop.start(make_request(steps=8, seed=2, guidance_end=0.5)),
    ]
    loop.run()
    events = gpu.take()
    assert waits(events) == NONE
    assert (events["replay"] > 0) == graphs
    assert max(map(error_of, jobs)) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_a_tick_is_at_most_two_ahead_of_the_gpu_and_a_cancelled_request_ends_with_the_next():
    loop = Loop()
    cancelled, other = loop.start(make_request(steps=10)), loop.start(make_request(steps=10, seed=1))
    for _ in range(4):
        loop.loop.tick()
        assert len(loop.loop._launched) <= 2
    cancelled.abort(RequestCancelledError("not wanted"))
    assert loop.loop.tick() == [cancelled]
    loop.run()
    assert error_of(other) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_a_request_is_answered_as_soon_as_the_gpu_is_done_with_it_and_not_before():
    loop = Loop()
    job, long = loop.start(make_request(steps=2)), loop.start(make_request(steps=9, seed=1))
    finished = [loop.loop.tick() for _ in range(4)]
    assert finished == [[], [], [], [job]], "two ticks later: when the GPU was waited for"
    assert error_of(job) <= TOLERANCE, "what is on its way would be NaN"
    loop.run()
    assert error_of(long) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_memory_that_is_short_for_once_is_counted_and_costs_nobody_their_result(monkeypatch):
    loop = Loop()
    jobs = [loop.start(make_request(steps=3, seed=seed)) for seed in range(4)]
    eager, failures = loop.unet._eager, []

    def short_of_memory(latents, *rest):
        if len(latents) > 3 and len(failures) < 2:
            failures.append(len(latents))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return eager(latents, *rest)

    monkeypatch.setattr(loop.unet, "_eager", short_of_memory)
    loop.run()
    assert failures == [8, 4]
    assert loop.metrics.take().shortages == 2
    assert max(map(error_of, jobs)) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_a_row_that_never_fits_fails_alone(monkeypatch):
    loop = Loop()
    large, small = loop.start(make_request(frames=40, steps=2)), loop.start(make_request(steps=2))
    eager = loop.unet._eager

    def fail(latents, *rest):
        if latents.shape[2] == 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return eager(latents, *rest)

    monkeypatch.setattr(loop.unet, "_eager", fail)
    loop.run()
    with pytest.raises(ForwardMemoryError):
        large.future.result(0)
    assert error_of(small) <= TOLERANCE


def test_a_failed_gpu_is_told_to_all_and_to_the_caller_of_the_loop(gpu):
    loop = Loop()
    jobs = [loop.start(make_request(steps=9, seed=seed)) for seed in range(2)]
    loop.loop.tick()
    gpu.is_broken = True
    with pytest.raises(DeviceLostError, match="the GPU has failed") as caught:
        loop.run()
    assert set(loop.loop.fail_all(caught.value)) == set(jobs)
    assert all(isinstance(job.future.exception(0), DeviceLostError) for job in jobs)
    assert loop.loop.is_idle


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("graphs", [False, True])
def test_all_of_it_happens_on_the_gpu_that_was_chosen(graphs):
    loop = Loop(graphs=graphs, device=1)
    job = loop.start(make_request(steps=3))
    assert isinstance(job.tensors, CudaTensor)
    assert job.tensors.place == torch.device("cuda", 1)
    loop.run()
    assert error_of(job) <= TOLERANCE


@pytest.mark.usefixtures("two_gpus")
def test_a_graph_that_was_captured_on_another_gpu_is_not_used():
    loop = Loop(device=1)
    graphs = TickGraphs(loop.unet.forward_at, torch.float32, ROWS, 16384, loop.reports.append, [(KEY, 16)])
    loop.loop._graphs = graphs
    torch.cuda.set_device(0)  # what nobody called once: streams and captures then belong to the first one
    loop.use_idle_time()
    assert "a replay differs from its forward" in loop.reports[0]
    job = loop.start(make_request(steps=3))
    loop.run()
    assert error_of(job) <= TOLERANCE


def test_another_length_gets_graphs_when_it_comes_a_second_time_and_nobody_waits(gpu):
    loop = Loop(graphs=True)
    for number in range(4):
        job = loop.start(make_request(frames=24, steps=3, seed=number))
        assert not loop.loop.use_idle_time(), "somebody waits"
        gpu.take()
        loop.run()
        assert (gpu.take()["replay"] > 0) == (number >= 2)
        assert error_of(job) <= TOLERANCE
        assert (loop.use_idle_time() > 0) == (number == 1)


@pytest.mark.usefixtures("gpu")
def test_longer_text_than_the_graphs_have_runs_without_them():
    loop = Loop(graphs=True)
    job = loop.start(make_request(tokens=20, steps=3))
    loop.run()
    assert error_of(job) <= TOLERANCE
    again = loop.start(make_request(tokens=9, steps=3))
    loop.run()
    assert error_of(again) <= TOLERANCE


@pytest.mark.parametrize("larger", [{"tokens": 20}, {"waveforms_per_prompt": 20}], ids=["text", "rows"])
def test_graphs_hold_when_longer_text_or_more_rows_have_come_in_between(gpu, larger):
    loop = Loop(graphs=True)
    for number, (sizes, replays) in enumerate([({}, True), (larger, False), ({}, True)]):
        job = loop.start(make_request(steps=2, seed=number, **sizes))
        gpu.take()
        loop.run()
        assert (gpu.take()["replay"] > 0) == replays
        assert error_of(job) <= TOLERANCE
    assert len(loop.reports) == len(ROWS), "none was made anew"


def test_jobs_of_long_and_short_text_at_once_have_the_text_of_their_own(gpu):
    loop = Loop(graphs=True)
    jobs = [loop.start(make_request(steps=3 + number, seed=number, tokens=5 + 9 * (number % 2))) for number in range(4)]
    jobs.append(loop.start(make_request(steps=2, seed=9, tokens=30)))
    gpu.take()
    loop.run()
    assert gpu.take()["replay"] > 0, "once the long text has gone"
    assert max(map(error_of, jobs)) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_longer_text_that_comes_often_gets_graphs_of_its_own_and_those_of_the_shorter_hold():
    loop = Loop(graphs=True)
    for number in range(2):
        loop.start(make_request(tokens=20, steps=2, seed=number))
        loop.run()
    loop.use_idle_time()
    batch = loop.loop._batches[KEY]
    assert batch.reserved_version(16)
    assert batch.reserved_version(32)
    assert len(loop.reports) == 2 * len(ROWS)
    for tokens in (20, 9):
        job = loop.start(make_request(tokens=tokens, steps=2))
        loop.run()
        assert error_of(job) <= TOLERANCE
    assert len(loop.reports) == 2 * len(ROWS), "none was made anew"


def test_nothing_is_captured_when_memory_is_nearly_used_up_and_what_is_only_kept_is_no_use(gpu, monkeypatch):
    kept = 5

    def free_and_total():
        return (5 if gpu.take()["wait"] else 5 - kept, 10)  # emptying PyTorch's cache counts as a wait

    monkeypatch.setattr(torch.cuda, "mem_get_info", free_and_total)
    assert len(Loop(graphs=True).reports) == len(ROWS)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0.5, 10))
    loop = Loop(graphs=True)
    assert loop.reports == ["no CUDA graphs for 16 frames and 16 tokens: the GPU's memory is nearly used up."]
    job = loop.start(make_request(steps=2))
    loop.run()
    assert error_of(job) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_nothing_is_captured_while_something_is_compiled_and_nobody_waits_for_it():
    loop = Loop()
    loop.loop._graphs = TickGraphs(loop.unet.forward_at, torch.float32, ROWS, 16384, loop.reports.append, [(KEY, 16)])
    with loop.loop._graphs.turn:
        assert not loop.loop.use_idle_time()
    assert loop.reports == []
    assert loop.use_idle_time() == 1 + len(ROWS)


def broken(*_: object) -> None:
    raise RuntimeError("CUDA error: operation failed")


@pytest.mark.usefixtures("gpu")
def test_a_capture_that_fails_costs_nobody_their_result_and_is_tried_again_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(tick_graphs.TickGraph, "__init__", broken)
    loop = Loop(graphs=True)
    assert (
        loop.reports == ["no CUDA graphs for 16 frames and 16 tokens (RuntimeError: CUDA error: operation failed)."] * 3
    )
    for seed in range(4):
        job = loop.start(make_request(steps=2, seed=seed))
        loop.run()
        loop.use_idle_time()
        assert error_of(job) <= TOLERANCE
    assert len(loop.reports) == 6, "three times for the size that was prepared, and for that of the requests"


@pytest.mark.usefixtures("gpu")
def test_a_capture_that_fails_once_is_made_the_next_time(monkeypatch):
    make, failures = tick_graphs.TickGraph.__init__, [1]

    def fail_once(*args):
        if failures:
            failures.pop()
            broken()
        make(*args)

    monkeypatch.setattr(tick_graphs.TickGraph, "__init__", fail_once)
    loop = Loop(graphs=True)
    assert len(loop.reports) == 1 + len(ROWS)
    assert loop.graphs.find(loop.loop._batches[KEY], KEY) is None, "nobody is seated"


@pytest.mark.usefixtures("gpu")
def test_a_copy_that_fails_loses_no_request(monkeypatch):
    loop = Loop()
    jobs = [loop.start(make_request(steps=2, seed=seed)) for seed in range(3)]
    copy, copies = denoising_loop.start_copy_to_cpu, []

    def fail_at_the_second(tensor):
        copies.append(tensor)
        return broken() if len(copies) == 2 else copy(tensor)

    monkeypatch.setattr(denoising_loop, "start_copy_to_cpu", fail_at_the_second)
    with pytest.raises(RuntimeError):
        loop.run()
    assert set(loop.loop.fail_all(StageError("the denoising loop failed"))) == set(jobs)
    assert all(isinstance(job.future.exception(0), StageError) for job in jobs)


def test_a_gpu_that_failed_while_nothing_ran_is_known_with_the_next_request(gpu, monkeypatch):
    loop = Loop()
    gpu.is_broken = True
    monkeypatch.setattr(denoising_batch.DenoisingBatch, "admit", broken)
    with pytest.raises(DeviceLostError):
        loop.start(make_request())


@pytest.mark.usefixtures("gpu")
def test_after_all_have_failed_no_graph_is_used_until_it_is_made_anew():
    loop = Loop(graphs=True)
    loop.start(make_request(steps=3))
    loop.loop.tick()
    loop.loop.fail_all(StageError("the denoising loop failed"))
    assert not loop.loop._graphs._graphs
    assert loop.use_idle_time() == 1 + len(ROWS)
    job = loop.start(make_request(steps=3, seed=1))
    loop.run()
    assert error_of(job) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_two_batches_of_equal_sizes_have_tensors_of_different_versions():
    versions = set()
    for _ in range(2):
        batch = denoising_batch.DenoisingBatch(KEY[:3], torch.device("cuda", 0), BUCKETS)
        batch.reserve(Loop().unet.blank_text(8), 4, 16)
        versions.add(batch.version)
    assert len(versions) == 2


@pytest.mark.usefixtures("gpu")
def test_no_graph_has_more_rows_than_a_forward_may_have():
    loop = Loop(graphs=True, max_frames=4 * 16)
    assert [report.split(" of ")[0] for report in loop.reports] == [f"captured {rows} rows" for rows in (4, 2, 1)]
    job = loop.start(make_request(steps=2, waveforms_per_prompt=4))
    loop.run()
    assert error_of(job) <= TOLERANCE


def test_a_forward_is_filled_up_to_twice_its_rows_and_no_further(gpu):
    loop = Loop(graphs=True)
    for requests, replays in ((5, False), (8, True)):  # 10 of 32 rows, and 16
        jobs = [loop.start(make_request(steps=2, seed=seed)) for seed in range(requests)]
        gpu.take()
        loop.run()
        assert (gpu.take()["replay"] > 0) == replays
        assert max(map(error_of, jobs)) <= TOLERANCE


@pytest.mark.usefixtures("gpu")
def test_a_budget_that_shrank_grows_again_while_graphs_run(monkeypatch):
    monkeypatch.setattr(frame_budget, "FORWARDS_TO_GROW", 5)
    loop = Loop(graphs=True)
    loop.loop._budget.shrink(1024)
    job = loop.start(make_request(steps=frame_budget.FORWARDS_TO_GROW))
    loop.run()
    assert loop.loop._budget.frames == 1024
    assert error_of(job) <= TOLERANCE
