"""Runs the denoising loop in a thread: admission, cancellation, deadlines, the end.

Everything that computes is done in that one thread, from loading the weights on. A second thread that computes would
get OpenMP threads of its own; with more of them than cores, they no longer wait actively for work, and every small
operation of the UNet takes twice as long (docs/denoising.md).
"""

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

from denoising_errors import DeadlineError, DenoisingError, ForwardError, RequestCancelledError, ShutdownError
from denoising_job import Job, never
from denoising_loop import DenoisingLoop
from denoising_request import DenoisingRequest, UNetSizes
from loop_metrics import LoopMetrics
from loop_options import LoopOptions
from scheduler_steps import SchedulerSteps
from torch import Tensor
from unet_forward import UNetForward


class DenoisingEngine:
    """Denoises requests of several threads together. It is a context manager, which closes it.

    Args:
        load_unet: Makes what predicts the noise; called in the loop's thread.
        schedulers: Makes the steps of requests.
        options: Limits.
        metrics: What happens is counted there.
        on_poll: Called from time to time, by a thread of the engine's own, with the requests in flight and waiting.
        clock: Seconds; deadlines are on it.
    """

    def __init__(
        self,
        load_unet: Callable[[], UNetForward],
        schedulers: SchedulerSteps,
        options: LoopOptions,
        metrics: LoopMetrics,
        on_poll: Callable[[int, int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._schedulers, self._options = schedulers, options
        self._metrics, self._on_poll, self._clock = metrics, on_poll, clock
        self._loaded: Future[UNetSizes] = Future()
        self._changed = threading.Condition()
        self._active: dict[Job, int] = {}  # rows of every job from its admission to its end
        self._arrived: list[Job] = []
        self._waiting = 0
        self._closing = False
        self._stop_polling = threading.Event()
        self._loop_thread = threading.Thread(target=self._run, args=[load_unet], name="denoising-loop", daemon=True)
        self._poll_thread = threading.Thread(target=self._poll, name="denoising-poll", daemon=True)
        self._loop_thread.start()
        self._sizes = self._loaded.result()
        self._poll_thread.start()

    def __enter__(self) -> "DenoisingEngine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def num_in_flight(self) -> int:
        """Requests that are being denoised."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Calls of `submit` that are blocked because all rows are taken."""
        return self._waiting

    def submit(
        self,
        request: DenoisingRequest,
        *,
        deadline: float | None = None,
        is_cancelled: Callable[[], bool] = never,
    ) -> "Future[Tensor]":
        """Start a request as soon as there are rows for it, and return without waiting for its result.

        Args:
            request: It is checked here.
            deadline: When the client's time is up, on the engine's clock.
            is_cancelled: Asked from time to time whether the client still wants it.

        Returns:
            Gets the latents, float32 [waveforms, channels, frames, bins] on the CPU, or a DenoisingError.

        Raises:
            DenoisingError: The request is wrong, or was dropped before it got its rows.
        """
        try:
            request.check(self._sizes, self._options.max_latent_frames)
            job = Job(request, self._schedulers.create(request.scheduler), deadline, is_cancelled)
            self._admit(job)
        except DenoisingError as error:
            self._metrics.count_request(error)
            raise
        return job.future

    def close(self, drain_timeout_s: float | None = None) -> None:
        """Take no more requests, finish those that run, and end the threads; calling it again does nothing.

        Args:
            drain_timeout_s: What isn't finished by then gets a ShutdownError; the options' if None.
        """
        timeout = self._options.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            drained = self._changed.wait_for(lambda: not self._active, timeout)
            if not drained:
                for job in self._active:
                    job.drop(ShutdownError("the server is stopping: try another one, or later."))
        self._loop_thread.join()
        self._stop_polling.set()
        self._poll_thread.join()

    def _admit(self, job: Job) -> None:
        """Wait until there are rows. A job that is larger than all of them waits until it is alone."""
        rows = job.request.num_rows
        with self._changed:
            self._waiting += 1
            try:
                while self._active and sum(self._active.values()) + rows > self._options.max_rows:
                    self._check_wanted(job)
                    self._changed.wait(self._options.poll_interval_s)
                self._check_wanted(job)
            finally:
                self._waiting -= 1
            self._active[job] = rows
            self._arrived.append(job)
            self._changed.notify_all()

    def _check_wanted(self, job: Job) -> None:
        if self._closing:
            raise ShutdownError("the server is stopping: try another one, or later.")
        if job.deadline is not None and self._clock() >= job.deadline:
            raise DeadlineError("the time was up before there was room in the denoising loop.")
        if job.is_cancelled():
            raise RequestCancelledError("the request was cancelled before there was room in the denoising loop.")

    def _run(self, load_unet: Callable[[], UNetForward]) -> None:
        try:
            unet = load_unet()
            frames = self._options.max_frames_per_forward(unet.device)
            loop = DenoisingLoop(unet, frames, self._options.text_buckets, self._metrics, self._clock)
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(unet.sizes)
        while self._take_arrivals(loop):
            ended = _tick(loop)
            if ended:
                with self._changed:
                    for job in ended:
                        del self._active[job]
                    self._changed.notify_all()

    def _take_arrivals(self, loop: DenoisingLoop) -> bool:
        """Hand new jobs to the loop, and wait for some while there are none; False when the loop shall end."""
        with self._changed:
            self._changed.wait_for(lambda: self._active or self._closing)
            arrived, self._arrived = self._arrived, []
            goes_on = bool(self._active)
        for job in arrived:
            loop.admit(job)
        return goes_on

    def _poll(self) -> None:
        stopped = False
        while not stopped:
            stopped = self._stop_polling.wait(self._options.poll_interval_s)
            try:
                self._poll_once()
            except Exception:  # what failed is tried again the next time
                traceback.print_exc()

    def _poll_once(self) -> None:
        with self._changed:
            jobs = list(self._active)
        for job in jobs:
            if not job.future.done() and job.is_cancelled():
                job.drop(RequestCancelledError(f"cancelled after {job.forwards_done} of {job.num_forwards} steps."))
        if self._on_poll:
            self._on_poll(self.num_in_flight, self.num_waiting)


def _tick(loop: DenoisingLoop) -> list[Job]:
    """Do a tick; a fault of the loop itself ends the jobs that it had, and not the thread."""
    try:
        return loop.tick()
    except Exception as error:
        for job in loop.jobs:
            job.drop(ForwardError(f"the denoising loop failed ({type(error).__name__}: {error})."))
        return loop.tick()
