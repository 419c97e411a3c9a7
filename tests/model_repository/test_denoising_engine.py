"""The engine's threads: admission, cancellation, deadlines, failures at the start, and the end."""

import dataclasses
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from denoising_engine import DenoisingEngine
from denoising_errors import (
    DeadlineError,
    ForwardError,
    InvalidRequestError,
    QueueFullError,
    QueueTimeoutError,
    RequestCancelledError,
    ShutdownError,
    UnknownSchedulerError,
)
from denoising_job import Progress
from loop_metrics import LoopMetrics
from text_conditioning import Conditioning
from unet_shapes import UNetSizes

from tests.helpers import waiting
from tests.helpers.tiny_unet import (
    CPU,
    GENERATED_WIDTH,
    PROMPT_WIDTH,
    make_forward,
    make_options,
    make_request,
    make_schedulers,
    make_unet,
    reference_latents,
    relative_rms,
)

TIMEOUT_S = 30.0

wait_until = functools.partial(waiting.wait_until, timeout_s=TIMEOUT_S, what="the engine's state")


class GatedUNet:
    """Does a forward when it is told to; counts them."""

    device = CPU
    sizes = UNetSizes(num_channels=8, generated_width=GENERATED_WIDTH, prompt_width=PROMPT_WIDTH, max_tokens=512)

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.forwards: list[int] = []
        self.entered = threading.Semaphore(0)

    def let_through(self, forwards: int) -> None:
        self.gate.release(forwards)

    def wait_for_forward(self) -> None:
        """Wait until a forward has begun, one more each time."""
        assert self.entered.acquire(timeout=TIMEOUT_S)

    def project(self, generated, prompt, mask):
        return Conditioning(generated, prompt, mask.float())

    def __call__(self, latents, _timesteps, _conditioning):
        self.forwards.append(len(latents))
        self.entered.release()
        assert self.gate.acquire(timeout=TIMEOUT_S)
        return latents * 0.1


class GatedGraphs:
    """Stands for a keeper of CUDA graphs with some left to capture; a capture ends when it is told to."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.left = 1
        self.events: list[str] = []
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def next_wanted(self) -> None:
        return None

    def next_outdated(self):
        return (((8, 16, 16, 8), 16), 2) if self.left else None

    def rows_of(self, _size) -> tuple[int, ...]:
        return (2,)

    def capture(self, *_) -> None:
        self.left -= 1
        self.events.append("capture")
        self.entered.release()
        assert self.gate.acquire(timeout=TIMEOUT_S)

    def tokens_of(self, _key) -> set[int]:
        return set()

    def ask_for(self, *_) -> None:
        pass

    def find(self, *_) -> None:
        return None


@pytest.fixture
def unet():
    return GatedUNet()


@pytest.fixture
def make_engine(unet):
    engines = []

    def make(**options) -> DenoisingEngine:
        options = make_options(**{"poll_interval_s": 0.002} | options)
        engines.append(DenoisingEngine(lambda: unet, make_schedulers(), options, LoopMetrics()))
        return engines[-1]

    yield make
    unet.let_through(10_000)
    for engine in engines:
        engine.close()


@pytest.fixture
def in_background():
    with ThreadPoolExecutor() as executor:
        yield executor.submit


def engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("denoising-")]


def test_requests_of_several_threads_get_what_diffusers_gives():
    requests = [make_request(seed=seed, steps=2 + seed, frames=12 + 4 * (seed % 2)) for seed in range(6)]
    with (
        DenoisingEngine(make_forward, make_schedulers(), make_options(), LoopMetrics()) as engine,
        ThreadPoolExecutor(6) as threads,
    ):
        results = list(threads.map(lambda request: engine.submit(request).result(TIMEOUT_S), requests))
    unet = make_unet()
    errors = [
        relative_rms(latents, reference_latents(unet, request))
        for request, latents in zip(requests, results, strict=True)
    ]
    assert max(errors) <= 1e-5


def test_everything_is_computed_in_one_thread(unet, make_engine):
    names = set()
    original = unet.project
    unet.project = lambda *tensors: (names.add(threading.current_thread().name), original(*tensors))[1]
    unet.let_through(4)
    make_engine().submit(make_request(steps=4)).result(TIMEOUT_S)
    assert names == {"denoising-loop"}


def test_graphs_are_captured_while_nobody_waits_and_never_beside_a_request():
    graphs = GatedGraphs()
    graphs.gate.release()
    with DenoisingEngine(
        make_forward, make_schedulers(), make_options(), LoopMetrics(), make_graphs=lambda _: graphs
    ) as engine:
        assert graphs.entered.acquire(timeout=TIMEOUT_S), "what is prepared beforehand"
        graphs.left = 3
        assert graphs.entered.acquire(timeout=TIMEOUT_S), "nobody waits"
        future = engine.submit(make_request(steps=4))
        future.add_done_callback(lambda _: graphs.events.append("request"))
        graphs.gate.release()  # the capture that has begun ends
        future.result(TIMEOUT_S)
        assert graphs.entered.acquire(timeout=TIMEOUT_S), "nobody waits again"
        assert graphs.events == ["capture", "capture", "request", "capture"]
        graphs.gate.release(2)


def test_a_request_is_told_once_when_there_is_room_for_it(unet, make_engine):
    engine = make_engine(max_rows=2)
    started: list[str] = []
    futures = [
        engine.submit(make_request(steps=2), on_start=lambda name=name: started.append(name))
        for name in ("first", "second")
    ]
    unet.wait_for_forward()
    assert started == ["first"]
    unet.let_through(2)
    futures[0].result(TIMEOUT_S)
    wait_until(lambda: started == ["first", "second"])
    unet.let_through(2)
    futures[1].result(TIMEOUT_S)
    assert started == ["first", "second"]


def test_requests_wait_while_all_rows_are_taken_and_start_when_some_are_free(unet, make_engine):
    engine = make_engine(max_rows=4)
    first, second, third = (engine.submit(make_request(steps=steps)) for steps in (1, 3, 1))
    assert (engine.num_in_flight, engine.num_waiting) == (2, 1)
    unet.wait_for_forward()
    unet.let_through(1)
    first.result(TIMEOUT_S)
    unet.let_through(1)
    third.result(TIMEOUT_S)
    assert not second.done()
    assert max(unet.forwards) == 4


def test_progress_is_told_in_the_queue_and_step_by_step_and_never_by_the_loop(unet, make_engine):
    engine = make_engine(max_rows=2)
    told = {name: [] for name in ("first", "second", "third")}
    threads = set()

    def watch(name):
        return lambda progress: (told[name].append(progress), threads.add(threading.current_thread().name))

    first, second, third = (engine.submit(make_request(steps=3), on_progress=watch(name)) for name in told)
    behind_one = Progress(0, 3, is_waiting=True, requests_ahead=1)
    wait_until(lambda: told["third"].count(behind_one) >= 2)  # when it came, and again in a poll
    assert Progress(0, 3, is_waiting=True) in told["second"]
    for step in (1, 2):
        unet.let_through(1)
        wait_until(lambda step=step: Progress(step, 3) in told["first"])
    assert not first.done()
    unet.let_through(1)
    wait_until(lambda: Progress(0, 3, is_waiting=True) in told["third"])  # the queue has moved on
    unet.let_through(6)
    third.result(TIMEOUT_S)
    assert told["first"][0] == Progress(0, 3, is_waiting=True), "how many steps there will be is known at once"
    for seen in told.values():
        assert [progress.step for progress in seen] == sorted(progress.step for progress in seen)
    assert "denoising-loop" not in threads
    assert second.done()


def test_a_step_that_takes_two_forwards_counts_once_when_both_are_done(unet, make_engine):
    seen = []
    future = make_engine().submit(make_request(steps=4, scheduler="HeunDiscreteScheduler"), on_progress=seen.append)
    for forwards in range(1, 7):
        unet.wait_for_forward()
        unet.let_through(1)
        wait_until(lambda forwards=forwards: Progress(forwards // 2, 4) in seen)
    assert not future.done(), "the seventh forward is its last one"
    unet.let_through(1)
    future.result(TIMEOUT_S)
    assert [progress.step for progress in seen] == sorted(progress.step for progress in seen)
    assert {progress.total_steps for progress in seen} == {4}
    assert len(unet.forwards) == 7


def test_a_watcher_that_fails_neither_ends_the_polling_nor_the_request(unet, make_engine, capfd):
    def fail(progress):
        if not progress.is_waiting:
            raise OSError("no room")

    engine = make_engine()
    is_cancelled = threading.Event()
    failing = engine.submit(make_request(steps=20), on_progress=fail)
    cancelled = engine.submit(make_request(steps=20), is_cancelled=is_cancelled.is_set)
    wait_until(lambda: "no room" in capfd.readouterr().err)
    is_cancelled.set()
    wait_until(lambda: engine_has_aborted(engine))
    unet.let_through(100)
    with pytest.raises(RequestCancelledError):
        cancelled.result(TIMEOUT_S)
    failing.result(TIMEOUT_S)
    engine.close()  # while what it prints has somewhere to go


def engine_has_aborted(engine):
    return any(job.error for job in list(engine._running))


def test_a_full_queue_refuses_at_once(unet, make_engine):
    engine = make_engine(max_rows=2, max_queue_size=3)
    accepted = [engine.submit(make_request(steps=1)) for _ in range(4)]
    with pytest.raises(QueueFullError, match="the queue is full with 3 requests: try again later"):
        engine.submit(make_request(steps=1))
    with pytest.raises(QueueFullError):
        engine.check_queue()
    assert engine.num_waiting == 3
    unet.let_through(4)
    for future in accepted:
        future.result(TIMEOUT_S)
    assert unet.forwards == [2, 2, 2, 2]
    assert engine._metrics.take().requests == {("finished", "ok"): 4, ("refused", "QueueFullError"): 2}
    engine.check_queue()


def test_a_request_larger_than_all_rows_runs_alone(unet, make_engine):
    unet.let_through(100)
    engine = make_engine(max_rows=4)
    large = engine.submit(make_request(steps=2, waveforms_per_prompt=5))
    small = engine.submit(make_request(steps=2))
    assert large.result(TIMEOUT_S).shape[0] == 5
    small.result(TIMEOUT_S)
    assert unet.forwards == [10, 10, 2, 2]


def test_a_cancelled_request_frees_its_rows_within_one_forward(unet, make_engine):
    engine = make_engine(max_rows=2)
    cancelled = threading.Event()
    first = engine.submit(make_request(steps=1000), is_cancelled=cancelled.is_set)
    second = engine.submit(make_request(steps=1))
    unet.wait_for_forward()
    cancelled.set()
    # The loop is inside a forward: it hears of it once the poll has come by.
    wait_until(lambda: next(iter(engine._running)).error is not None)
    unet.let_through(1)
    with pytest.raises(RequestCancelledError, match="cancelled after 0 of 1000 steps"):
        first.result(TIMEOUT_S)
    unet.let_through(1)
    second.result(TIMEOUT_S)
    assert unet.forwards == [2, 2], "one of the first request, and one of the second"


def test_a_waiting_request_can_be_cancelled(make_engine):
    engine = make_engine(max_rows=2)
    engine.submit(make_request(steps=5))
    cancelled = threading.Event()
    waiting = engine.submit(make_request(), is_cancelled=cancelled.is_set)
    cancelled.set()
    with pytest.raises(RequestCancelledError, match="cancelled before there was room"):
        waiting.result(TIMEOUT_S)
    assert engine.num_waiting == 0


def test_a_waiting_request_whose_time_is_up_is_answered(make_engine):
    engine = make_engine(max_rows=2)
    engine.submit(make_request(steps=5))
    waiting = engine.submit(make_request(), deadline=time.monotonic() + 0.02)
    with pytest.raises(DeadlineError, match="the time was up before there was room"):
        waiting.result(TIMEOUT_S)


def test_a_request_that_waits_for_too_long_is_answered(make_engine):
    engine = make_engine(max_rows=2, queue_timeout_s=0.02)
    engine.submit(make_request(steps=5))
    with pytest.raises(QueueTimeoutError, match=r"waited for 0.02 s in the queue: try again later"):
        engine.submit(make_request()).result(TIMEOUT_S)


def test_one_that_waits_for_many_rows_lets_those_behind_it_go_when_it_is_dropped(unet, make_engine):
    engine = make_engine(max_rows=4)
    engine.submit(make_request(steps=1000))
    cancelled = threading.Event()
    large = engine.submit(make_request(waveforms_per_prompt=2), is_cancelled=cancelled.is_set)
    small = engine.submit(make_request(steps=1))
    assert engine.num_waiting == 2, "first come, first served"
    cancelled.set()
    with pytest.raises(RequestCancelledError):
        large.result(TIMEOUT_S)
    unet.let_through(2)
    small.result(TIMEOUT_S)


def test_a_deadline_that_has_passed_costs_no_forward(unet, make_engine):
    engine = make_engine()
    with pytest.raises(DeadlineError):
        engine.submit(make_request(), deadline=time.monotonic() - 1)
    assert unet.forwards == []


def test_a_wrong_request_is_refused_before_it_takes_rows(make_engine):
    engine = make_engine()
    with pytest.raises(UnknownSchedulerError, match=r"scheduler must be one of .* got 'Nonsense'"):
        engine.submit(make_request(scheduler="Nonsense"))
    with pytest.raises(InvalidRequestError, match="latents_shape is out of bounds: waveforms x frames must be at most"):
        engine.submit(make_request(frames=10**6))
    assert engine.num_in_flight == 0
    assert engine._metrics.take().requests == {
        ("failed", "UnknownSchedulerError"): 1,
        ("failed", "InvalidRequestError"): 1,
    }


def test_closing_finishes_what_runs_and_leaves_no_thread(unet, make_engine, in_background):
    engine = make_engine()
    running = engine.submit(make_request(steps=3))
    closing = in_background(engine.close)
    wait_until(lambda: engine._closing)
    with pytest.raises(ShutdownError, match="the server is stopping"):
        engine.submit(make_request())
    unet.let_through(3)
    closing.result(TIMEOUT_S)
    assert running.result(0).shape == (1, 8, 16, 16)
    assert engine_threads() == []


def test_closing_answers_what_waits_and_what_does_not_finish_in_time(unet, make_engine, in_background):
    engine = make_engine(max_rows=2)
    running, waiting = engine.submit(make_request(steps=1000)), engine.submit(make_request())
    closing = in_background(engine.close, 0.01)
    with pytest.raises(ShutdownError):
        waiting.result(TIMEOUT_S)
    wait_until(lambda: next(iter(engine._running)).error is not None)
    unet.let_through(1)
    closing.result(TIMEOUT_S)
    with pytest.raises(ShutdownError):
        running.result(0)
    assert engine_threads() == []


def test_a_unet_that_cannot_be_loaded_fails_the_start_and_leaves_no_thread():
    def load():
        raise OSError("no weights")

    with pytest.raises(OSError, match="no weights"):
        DenoisingEngine(load, make_schedulers(), make_options(), LoopMetrics())
    wait_until(lambda: engine_threads() == [])


def test_a_fault_of_the_loop_itself_ends_its_requests_and_not_the_engine(unet, make_engine, monkeypatch):
    engine = make_engine()
    unet.let_through(100)
    with monkeypatch.context() as patch:
        patch.setattr("denoising_loop.priority", None)
        with pytest.raises(Exception, match="the denoising loop failed"):
            engine.submit(make_request()).result(TIMEOUT_S)
    assert engine.submit(make_request()).result(TIMEOUT_S).shape == (1, 8, 16, 16)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), RuntimeError("no")])
def test_a_request_that_fails_at_its_start_does_not_end_the_engine(unet, make_engine, monkeypatch, error):
    engine = make_engine()
    unet.let_through(100)

    def fail(*_tensors):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(unet, "project", fail)
        with pytest.raises(ForwardError):
            engine.submit(make_request()).result(TIMEOUT_S)
    assert engine.submit(make_request()).result(TIMEOUT_S).shape == (1, 8, 16, 16)
    wait_until(lambda: engine.num_in_flight == 0)


def test_a_request_that_fails_at_its_end_does_not_end_the_engine(unet, make_engine, monkeypatch):
    engine = make_engine()
    unet.let_through(100)
    with monkeypatch.context() as patch:
        patch.setattr("denoising_loop.torch.isfinite", None)
        with pytest.raises(ForwardError, match="TypeError"):
            engine.submit(make_request()).result(TIMEOUT_S)
    assert engine.submit(make_request()).result(TIMEOUT_S).shape == (1, 8, 16, 16)


BAD_SCHEDULERS = {
    "a wrong value": ({"beta_schedule": "nope"}, "DPMSolverMultistepScheduler can't be made with"),
    "another wrong value": ({"algorithm_type": "nope"}, "DPMSolverMultistepScheduler can't be made with"),
    "an unknown option": ({"nope": True}, "DPMSolverMultistepScheduler has no option 'nope'"),
}


@pytest.mark.parametrize(("options", "problem"), BAD_SCHEDULERS.values(), ids=BAD_SCHEDULERS)
def test_scheduler_options_that_the_scheduler_cannot_have_are_refused(make_engine, options, problem):
    request = make_request()
    scheduler = dataclasses.replace(request.scheduler, options=tuple(options.items()))
    with pytest.raises(InvalidRequestError, match=problem):
        make_engine().submit(dataclasses.replace(request, scheduler=scheduler))


def test_what_fails_while_polling_does_not_end_the_polling(unet, capfd):
    calls = []

    def on_poll(in_flight: int, waiting: int) -> None:
        calls.append((in_flight, waiting))
        raise ValueError("not this time")

    engine = DenoisingEngine(
        lambda: unet, make_schedulers(), make_options(poll_interval_s=0.001), LoopMetrics(), on_poll=on_poll
    )
    wait_until(lambda: len(calls) >= 3)
    engine.close()
    assert set(calls) == {(0, 0)}
    assert "not this time" in capfd.readouterr().err


BAD_TENSORS = {
    "channels": ({"latents_shape": (1, 7, 16, 16)}, r"latents_shape must be .* with 8 channels, got \[1, 7, 16, 16\]"),
    "no waveform": ({"latents_shape": (0, 8, 16, 16)}, "latents_shape must be positive sizes"),
    "negative bins": ({"latents_shape": (1, 8, 16, -1)}, "latents_shape must be positive sizes"),
    "huge": ({"latents_shape": (2**40, 8, 2**40, 16)}, "latents_shape is out of bounds"),
    "width": ({"prompt_embeds": torch.zeros(2, 7, 5)}, r"prompt_embeds must be .* 20\], got \[2, 7, 5\]"),
    "no tokens": ({"prompt_embeds": torch.zeros(2, 0, 20)}, r"prompt_embeds must be .* 20\], got \[2, 0, 20\]"),
    "too many tokens": ({"prompt_embeds": torch.zeros(2, 513, 20)}, "prompt_embeds .* at most 512 tokens, got 513"),
    "rows": ({"generated_prompt_embeds": torch.zeros(3, 8, 12)}, r"must have as many rows as .* \(2\), got 3"),
    "GPT-2 width": ({"generated_prompt_embeds": torch.zeros(2, 8, 9)}, r"must be \[rows, at least 1, 12\]"),
    "mask": ({"attention_mask": torch.ones(2, 6, dtype=torch.int64)}, r"attention_mask must have the shape \[2, 7\]"),
    "waveforms": ({"guidance_scale": None, "latents_shape": (3, 8, 16, 16)}, "a multiple of the 2 prompts, got 3"),
}


@pytest.mark.parametrize(("changes", "problem"), BAD_TENSORS.values(), ids=BAD_TENSORS)
def test_tensors_that_do_not_fit_are_refused(make_engine, changes, problem):
    with pytest.raises(InvalidRequestError, match=problem):
        make_engine().submit(dataclasses.replace(make_request(), **changes))


def test_an_odd_number_of_rows_with_guidance_is_refused(make_engine):
    odd = dataclasses.replace(make_request(prompts=3, guidance_scale=None), guidance_scale=2.0)
    with pytest.raises(InvalidRequestError, match="prompt_embeds must have a row for each prompt"):
        make_engine().submit(odd)
