"""The denoising loop: continuous batching, a forward at a time.

At every tick, requests come and go, and one forward of the UNet serves rows of all that have latents of one size,
whatever step each is at. This is the loop alone, without threads: DenoisingEngine drives it.

A GPU is told what to do up to TICKS_AHEAD ticks ahead of what it has done, so that it never waits for Python: which job
is at its last timestep is known beforehand. Only who leaves is waited for.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from denoising_batch import DenoisingBatch
from denoising_errors import DenoisingError, DeviceLostError, NonFiniteError, as_denoising_error
from denoising_job import Job
from device_copies import start_copy_to_cpu
from device_timing import Moment, moments_of
from frame_budget import FrameBudget
from job_priority import priority
from loop_metrics import LoopMetrics
from row_seats import RowRange
from tick_graphs import Size, TickGraph, TickGraphs
from torch import Tensor
from unet_forward import UNetForward

TICKS_AHEAD = {"cpu": 0, "cuda": 2}
"""Ticks that may be under way when `tick` returns. A cancelled request's rows are computed so many times more."""


@dataclass(frozen=True)
class _LaunchedTick:
    """A tick that the device has been told.

    Attributes:
        began: When it did the first of it.
        ended: When it has done the last.
        ranges: The rows of its forward.
        jobs: Those that ran then.
        steps: Scheduler steps that it completes.
        latents: Of those that are at their last timestep; they are on the CPU once it has ended.
    """

    began: Moment
    ended: Moment
    ranges: tuple[RowRange, ...]
    jobs: tuple[Job, ...]
    steps: int
    latents: dict[Job, Tensor]


class DenoisingLoop:
    """Denoises any number of jobs, a forward at a time. Not safe to be used by two threads at once.

    Args:
        unet: Predicts the noise.
        max_frames_per_forward: Rows x latent frames of one forward, at most; one row always fits.
        text_buckets: Token counts to which text is padded.
        metrics: What happens is counted there.
        clock: Seconds; deadlines are on it.
        graphs: Of whole ticks, on a GPU.

    Attributes:
        jobs: Those that run; not those that are at their last timestep, for which the device is waited.
    """

    def __init__(
        self,
        unet: UNetForward,
        max_frames_per_forward: int,
        text_buckets: tuple[int, ...],
        metrics: LoopMetrics,
        clock: Callable[[], float] = time.monotonic,
        graphs: TickGraphs | None = None,
    ) -> None:
        self.jobs: list[Job] = []
        self._unet, self._metrics, self._clock = unet, metrics, clock
        self._budget, self._text_buckets = FrameBudget(max_frames_per_forward), text_buckets
        self._graphs = graphs
        self._moment = moments_of(unet.device, clock)
        self._ticks_ahead = TICKS_AHEAD[unet.device.type]
        self._batches: dict[tuple[int, int, int, int], DenoisingBatch] = {}
        self._launched: deque[_LaunchedTick] = deque()
        self._finished: list[Job] = []  # not yet returned by `tick`

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do, and nothing under way."""
        return not (self.jobs or self._launched or self._finished)

    @torch.inference_mode()
    def admit(self, job: Job) -> None:
        """Let a job take part from the next tick on.

        Raises:
            DeviceLostError: The GPU has failed.
        """
        self.jobs.append(job)
        try:
            job.project_text(self._unet)
            batch = self._batch_of(job)
            batch.admit(job)
            if self._graphs:
                self._graphs.ask_for(job.key, batch.bucket_of(job.conditioning.tokens))
        except Exception as error:
            job.abort(as_denoising_error(error))
            if not isinstance(error, torch.OutOfMemoryError):
                self.check_device()

    @torch.inference_mode()
    def tick(self) -> list[Job]:
        """Do one forward, and what it completes; return the jobs that have finished, their futures done.

        Raises:
            DeviceLostError: The GPU has failed; `fail_all` is all that is left to do.
        """
        # 1. Jobs whose deadline has passed or that were aborted finish with an error.
        now = self._clock()
        for job in self.jobs:
            if error := job.deadline_error(now):
                job.abort(error)
        self._end_aborted()
        # 2. The job of the highest priority takes those of its size along: one forward, guidance and scheduler steps.
        if self.jobs:
            self._launch(self._choose_rows(now))
            self._end_aborted()
        # 3. What the device has done is accounted for; jobs that it has brought to the end finish with their latents.
        while len(self._launched) > (self._ticks_ahead if self.jobs else 0):
            self._retire(self._launched.popleft())
        finished, self._finished = self._finished, []
        return finished

    @property
    def has_graphs(self) -> bool:
        """Whether `use_idle_time` may find something to do."""
        return self._graphs is not None

    @torch.inference_mode()
    def use_idle_time(self) -> bool:
        """Capture one graph that would be of use, if there is one; say whether something was done.

        Raises:
            DeviceLostError: The GPU has failed.
        """
        if self._graphs is None or not self.is_idle or not self._graphs.turn.acquire(blocking=False):
            return False
        try:
            return self._make_a_graph(self._graphs)
        finally:
            self._graphs.turn.release()

    def _make_a_graph(self, graphs: TickGraphs) -> bool:
        wanted = graphs.next_wanted()
        size, rows = (wanted, 0) if wanted else graphs.next_outdated() or (None, 0)
        if size is None:
            return False
        try:
            batch = self._blank_batch(size, graphs)
            if wanted:
                graphs.begin(batch, size)
            else:
                graphs.capture(batch, size, rows)
        except Exception as error:  # whatever it is, requests go on without graphs
            self.check_device()
            graphs.drop(size, error)
        self._keep_what_graphs_need(graphs)
        return True

    def _keep_what_graphs_need(self, graphs: TickGraphs) -> None:
        for key, batch in list(self._batches.items()):
            if tokens := graphs.tokens_of(key):
                batch.keep_reserved(tokens)
            else:
                del self._batches[key]

    def _blank_batch(self, size: Size, graphs: TickGraphs) -> DenoisingBatch:
        """Return the batch of a size, with room for what its graphs have, and with nobody seated."""
        (channels, frames, bins, vectors), tokens = size
        key = (channels, frames, bins, vectors)
        if key not in self._batches:
            self._batches[key] = DenoisingBatch((channels, frames, bins), self._unet.device, self._text_buckets)
        self._batches[key].reserve(self._unet.blank_text(vectors), graphs.rows_of(size)[-1], tokens)
        return self._batches[key]

    def fail_all(self, error: DenoisingError) -> list[Job]:
        """End all jobs with an error, and forget what was under way; return them and those that had finished."""
        leaving = [job for tick in self._launched for job in tick.latents]
        for job in [*self.jobs, *leaving]:
            job.abort(error)
            self._finish(job)
        self.jobs, self._batches = [], {}
        if self._graphs:
            self._graphs.make_anew()  # they have the addresses of what is gone
        self._launched.clear()
        finished, self._finished = self._finished, []
        return finished

    def _end_aborted(self) -> None:
        for job in [job for job in self.jobs if job.error]:
            self._leave(job)
            self._finish(job)

    def _batch_of(self, job: Job) -> DenoisingBatch:
        if job.key not in self._batches:
            self._batches[job.key] = DenoisingBatch(job.key[:3], self._unet.device, self._text_buckets)
        return self._batches[job.key]

    def _choose_rows(self, now: float) -> tuple[RowRange, ...]:
        """Return rows of jobs of one size, by priority, as many as fit into a forward; at least one."""
        by_priority = sorted(self.jobs, key=lambda job: priority(job, now), reverse=True)
        key = by_priority[0].key
        room = self._budget.rows(by_priority[0].request.latents_shape[2])
        chosen = {}
        for job in by_priority:
            if job.key == key and room:
                chosen[job] = RowRange(job, job.rows[job.rows_done : job.rows_done + room])
                room -= len(chosen[job])
        return tuple(chosen[job] for job in self.jobs if job in chosen)

    def _launch(self, ranges: tuple[RowRange, ...]) -> None:
        """Have the device do a forward of some rows, and the steps of the jobs that it completes."""
        began, jobs = self._moment(), tuple(self.jobs)
        batch = self._batch_of(ranges[0].job)
        if not self._seat(batch, ranges):
            return
        batch.set_input_scales()
        graph = self._graph_of(batch, ranges)
        if graph:
            graph.replay()
            self._budget.count_forward()
        else:
            self._predict(batch, slice(0, len(batch.rows)))
        for rows in ranges:
            rows.job.rows_done += len(rows)
        complete = [job for job in batch.jobs if job.rows_done == len(job.rows) and not job.error]
        steps_before = sum(job.steps_done for job in complete)
        if graph:
            batch.count_forward(complete)
        elif complete:
            batch.advance(complete)
        if any(job.error for job in complete):
            self.check_device()
        steps = sum(job.steps_done for job in complete) - steps_before
        ending = [rows.job for rows in ranges if rows.job.forwards_done == rows.job.num_forwards and not rows.job.error]
        latents = {job: start_copy_to_cpu(job.latents) for job in ending}
        self._launched.append(_LaunchedTick(began, self._moment(), ranges, jobs, steps, latents))
        for job in ending:  # only now: until it stands there, `fail_all` finds it among the others
            self._leave(job)

    def _seat(self, batch: DenoisingBatch, ranges: tuple[RowRange, ...]) -> bool:
        """Seat rows; False where that fails. Then fewer rows are tried next, or their jobs end, and no others."""
        try:
            batch.seat(ranges)
        except torch.OutOfMemoryError as error:
            self._note_shortage(ranges[0].job, sum(map(len, ranges)))
            if sum(map(len, ranges)) == 1:
                ranges[0].job.abort(as_denoising_error(error))
        except Exception as error:
            self.check_device()
            for rows in ranges:
                rows.job.abort(as_denoising_error(error))
        else:
            return True
        return False

    def _graph_of(self, batch: DenoisingBatch, ranges: tuple[RowRange, ...]) -> TickGraph | None:
        """Return a graph for a tick, if there is one: it moves all jobs on, so all of their rows must be seated."""
        if self._graphs is None or any(len(rows) != len(rows.job.rows) for rows in ranges):
            return None
        return self._graphs.find(batch, ranges[0].job.key)

    def _predict(self, batch: DenoisingBatch, seats: slice) -> None:
        """Predict the noise of rows. What fails is tried again in halves, down to the row that can't be done."""
        try:
            batch.store(seats, self._unet(*batch.inputs(seats, batch.tokens)))
        except Exception as caught:
            error = caught.with_traceback(None)  # the traceback holds on to the tensors that didn't fit
        else:
            self._budget.count_forward()
            return
        rows = batch.rows[seats]
        if isinstance(error, torch.OutOfMemoryError):
            self._note_shortage(rows[0].job, len(rows))
        else:
            self.check_device()
        if len(rows) == 1:
            rows[0].job.abort(as_denoising_error(error))
            return
        middle = (seats.start + seats.stop) // 2
        for half in (slice(seats.start, middle), slice(middle, seats.stop)):
            if not all(row.job.error for row in batch.rows[half]):
                self._predict(batch, half)

    def _note_shortage(self, job: Job, rows: int) -> None:
        """Do smaller forwards after one of so many rows of a job's size, for which memory wasn't enough."""
        self._metrics.count_shortage()
        self._budget.shrink(rows * job.request.latents_shape[2])
        if self._unet.device.type == "cuda":
            torch.cuda.empty_cache()

    def _retire(self, tick: _LaunchedTick) -> None:
        """Wait until the device has done a tick, and account for it."""
        try:
            tick.ended.wait()
            seconds = tick.ended.seconds_since(tick.began)
        except Exception as error:
            self._launched.appendleft(tick)
            raise _device_lost(error) from error
        for job in tick.jobs:
            job.fair_share_s += seconds / len(tick.jobs)
        rows_of_all = sum(map(len, tick.ranges))
        for rows in tick.ranges:
            rows.job.used_s += seconds * len(rows) / rows_of_all
        self._metrics.count_forward(rows_of_all, seconds, tick.steps)
        for job, latents in tick.latents.items():
            self._finish(job, latents)

    def check_device(self) -> None:
        """Find out whether a GPU goes on after an error; kernels fail later than they are called.

        Raises:
            DeviceLostError: It doesn't.
        """
        if self._unet.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._unet.device)
        except Exception as error:
            raise _device_lost(error) from error

    def _leave(self, job: Job) -> None:
        """Free a job's place. The batch goes with the last job."""
        self.jobs.remove(job)
        if batch := self._batches.get(job.key):
            batch.release(job)
            is_last = not any(other.key == job.key for other in self.jobs)
            if is_last and not (self._graphs and self._graphs.tokens_of(job.key)):
                del self._batches[job.key]

    def _finish(self, job: Job, latents: Tensor | None = None) -> None:
        """End a job, with its latents or with its error; its future is done afterwards."""
        self._finished.append(job)
        error = job.error
        try:
            if not error:
                job.future.set_result(_checked(job, latents))
        except Exception as caught:
            error = as_denoising_error(caught)
        if error:
            job.future.set_exception(error)
        self._metrics.count_request(error)


def _checked(job: Job, latents: Tensor | None) -> Tensor:
    if latents is None or not torch.isfinite(latents).all():
        name = job.request.scheduler.name
        raise NonFiniteError(f"{name} with {job.num_steps} steps gave latents that are not finite.")
    return latents


def _device_lost(error: Exception) -> DeviceLostError:
    return DeviceLostError(f"the GPU has failed ({type(error).__name__}: {error}); try again in some seconds.")
