"""Runs the denoising loop in a thread: the queue, cancellation, deadlines, progress, the end.

Everything that computes is done in that one thread, from loading the weights on. A second thread that computes would
get OpenMP threads of its own; with more of them than cores, they no longer wait actively for work, and every small
operation of the UNet takes twice as long (docs/denoising.md).
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from denoising_errors import (
    DenoisingError,
    DeviceLostError,
    QueueFullError,
    QueueTimeoutError,
    RequestCancelledError,
    ShutdownError,
    StageError,
)
from denoising_job import Job, Progress, ignore_progress, ignore_start, not_cancelled
from denoising_loop import DenoisingLoop
from denoising_request import DenoisingRequest
from loop_metrics import LoopMetrics
from loop_options import LoopOptions
from scheduler_steps import SchedulerSteps
from tick_graphs import TickGraphs
from torch import Tensor
from unet_forward import UNetForward
from unet_shapes import UNetSizes

IDLE_POLL_S = 1.0
"""Where there are CUDA graphs: how often it is looked whether one can be made anew."""


def no_graphs(_: UNetForward) -> None:
    """Return None: the default where there are no CUDA graphs."""


class DenoisingEngine:
    """Denoises requests of several threads together. It is a context manager, which closes it.

    Args:
        load_unet: Makes what predicts the noise; called in the loop's thread.
        schedulers: Makes the steps of requests.
        options: Limits.
        metrics: What happens is counted there.
        on_poll: Called from time to time, by a thread of the engine's own, with the requests in flight and waiting.
        make_graphs: Makes the keeper of CUDA graphs, in the loop's thread.
        on_device_lost: Called by the loop's thread, which ends then, when a GPU has failed for good and all requests
            have been told so.
        clock: Seconds; deadlines are on it.
    """

    def __init__(
        self,
        load_unet: Callable[[], UNetForward],
        schedulers: SchedulerSteps,
        options: LoopOptions,
        metrics: LoopMetrics,
        on_poll: Callable[[int, int], None] | None = None,
        on_device_lost: Callable[[], object] = ignore_start,
        make_graphs: Callable[[UNetForward], TickGraphs | None] = no_graphs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._schedulers, self._options = schedulers, options
        self._metrics, self._on_poll, self._clock = metrics, on_poll, clock
        self._on_device_lost, self._make_graphs = on_device_lost, make_graphs
        self._loaded: Future[UNetSizes] = Future()
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[Job] = deque()
        self._scheduled: list[Job] = []  # running, but not yet handed to the loop
        self._running: dict[Job, int] = {}  # the rows of each job, from when it gets them until it has finished
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
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, for which there are no rows yet."""
        return len(self._waiting)

    def submit(
        self,
        request: DenoisingRequest,
        *,
        deadline: float | None = None,
        is_cancelled: Callable[[], bool] = not_cancelled,
        on_progress: Callable[[Progress], object] = ignore_progress,
        on_start: Callable[[], object] = ignore_start,
    ) -> "Future[Tensor]":
        """Start a request, or put it into the queue; never blocks.

        Args:
            request: It is checked here.
            deadline: When the client's time is up, on the engine's clock.
            is_cancelled: Asked from time to time whether the client still wants it.
            on_progress: Called from time to time with how far it is, until its future is done and perhaps once after.
            on_start: Called once, when there is room for it; must be quick.

        Returns:
            Gets the latents, float32 [waveforms, channels, frames, bins] on the CPU, or a DenoisingError.

        Raises:
            DenoisingError: The request is wrong, too late, or one too many.
        """
        try:
            request.check(self._sizes, self._options.max_latent_frames)
            steps = self._schedulers.create(request.scheduler)
            job = Job(request, steps, deadline, is_cancelled, on_progress, on_start, self._clock())
            if error := self._abort_reason(job):
                raise error
            job.on_progress(Progress(0, job.num_steps, is_waiting=True, requests_ahead=self.num_waiting))
            self._enqueue(job)
        except DenoisingError as error:
            self._metrics.count_request(error)
            raise
        return job.future

    def check_queue(self) -> None:
        """Refuse a request before any work is done for it; `submit` checks again.

        Raises:
            QueueFullError: As many wait already as may.
        """
        if len(self._waiting) >= self._options.max_queue_size:
            error = self._queue_full_error()
            self._metrics.count_request(error)
            raise error

    def close(self, drain_timeout_s: float | None = None) -> None:
        """Accept no more requests, finish those that run, and end the threads; calling it again does nothing.

        Args:
            drain_timeout_s: What isn't finished by then gets a ShutdownError; the options' if None.
        """
        timeout = self._options.drain_timeout_s if drain_timeout_s is None else drain_timeout_s
        with self._changed:
            self._closing = True
            while self._waiting:
                self._reject(self._waiting.popleft(), _shutdown_error())
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._running, timeout)
            for job in self._running:
                job.abort(_shutdown_error())
        self._loop_thread.join()
        self._stop_polling.set()
        self._poll_thread.join()

    def _enqueue(self, job: Job) -> None:
        with self._changed:
            if self._closing:
                raise _shutdown_error()
            self._waiting.append(job)
            self._schedule_waiting()
            if len(self._waiting) > self._options.max_queue_size:
                self._waiting.remove(job)
                raise self._queue_full_error()

    def _queue_full_error(self) -> QueueFullError:
        return QueueFullError(f"the queue is full with {self._options.max_queue_size} requests: try again later.")

    def _schedule_waiting(self) -> None:
        """Start waiting jobs in their order while there are rows. One that needs more than `max_rows` runs alone."""
        while self._waiting:
            rows = self._waiting[0].request.num_rows
            if self._running and sum(self._running.values()) + rows > self._options.max_rows:
                return
            job = self._waiting.popleft()
            self._running[job] = rows
            job.on_start()
            self._scheduled.append(job)
            self._changed.notify_all()

    def _run(self, load_unet: Callable[[], UNetForward]) -> None:
        try:
            unet = load_unet()
            frames = self._options.max_frames_per_forward(unet.device)
            buckets, graphs = self._options.text_buckets, self._make_graphs(unet)
            loop = DenoisingLoop(unet, frames, buckets, self._metrics, self._clock, graphs)
            while loop.use_idle_time():
                pass  # what is prepared beforehand
        except BaseException as error:
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(unet.sizes)
        goes_on = True
        while goes_on:
            try:
                if goes_on := self._hand_over(loop):
                    self._part_with(loop.tick())
            except DeviceLostError as error:
                self._give_up(loop, error)
                return
            except Exception as fault:  # of the loop's own: the thread goes on, with those that come
                traceback.print_exc()
                try:
                    loop.check_device()
                except DeviceLostError as error:
                    self._give_up(loop, error)
                    return
                self._part_with(
                    loop.fail_all(StageError(f"the denoising loop failed ({type(fault).__name__}: {fault})."))
                )

    def _part_with(self, finished: list[Job]) -> None:
        """Give the rows of jobs that are over to those that wait."""
        if finished:
            with self._changed:
                for job in finished:
                    self._running.pop(job, None)
                self._schedule_waiting()
                self._changed.notify_all()

    def _give_up(self, loop: DenoisingLoop, error: DeviceLostError) -> None:
        """Tell all requests that the GPU has failed, those that come from now on too."""
        with self._changed:
            self._closing = True
            for job in (*self._waiting, *self._scheduled):
                self._reject(job, error)
            self._waiting.clear()
            self._scheduled.clear()
            loop.fail_all(error)
            self._running.clear()
            self._changed.notify_all()
        self._on_device_lost()

    def _hand_over(self, loop: DenoisingLoop) -> bool:
        """Hand new jobs to the loop, and wait for some while there are none; return False when the loop must end."""
        self._wait_for_jobs(loop)
        while True:
            with self._changed:
                if not self._scheduled:
                    return bool(self._running)
                job = self._scheduled.pop(0)
            loop.admit(job)

    def _wait_for_jobs(self, loop: DenoisingLoop) -> None:
        """Wait until something runs, or the end; meanwhile, capture CUDA graphs."""
        while True:
            with self._changed:
                if self._running or self._closing:
                    return
            timeout = 0.0 if loop.use_idle_time() else IDLE_POLL_S if loop.has_graphs else None
            with self._changed:
                if self._changed.wait_for(lambda: self._running or self._closing, timeout):
                    return

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
            progress = {job: Progress(job.steps_done, job.num_steps) for job in self._running}
            for ahead, job in enumerate(self._waiting):
                progress[job] = Progress(0, job.num_steps, is_waiting=True, requests_ahead=ahead)
        for job in progress:
            if not job.future.done() and (error := self._abort_reason(job)):
                self._abort(job, error)
        if self._on_poll:
            self._on_poll(self.num_in_flight, self.num_waiting)
        for job, how_far in progress.items():  # last: a callback may fail
            if not job.future.done():
                job.on_progress(how_far)

    def _abort_reason(self, job: Job) -> DenoisingError | None:
        """Return why a job must not go on, None if it may; asking for cancellation takes a while."""
        now = self._clock()
        if error := job.deadline_error(now):
            return error
        if job not in self._running and now >= job.arrived_s + self._options.queue_timeout_s:
            return QueueTimeoutError(f"waited for {self._options.queue_timeout_s:g} s in the queue: try again later.")
        if job.is_cancelled():
            return RequestCancelledError(f"the request was cancelled {job.progress}.")
        return None

    def _abort(self, job: Job, error: DenoisingError) -> None:
        """Reject a job that waits; one that runs is stopped by the loop, after the present forward."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._reject(job, error)
                self._schedule_waiting()  # it may have been the one that held up those behind it
            else:
                job.abort(error)

    def _reject(self, job: Job, error: DenoisingError) -> None:
        self._metrics.count_request(error)
        job.future.set_exception(error)


def _shutdown_error() -> ShutdownError:
    return ShutdownError("the server is stopping: try another one, or later.")
