"""The denoising loop: continuous batching, a forward at a time.

At every tick, requests come and go, and one forward of the UNet serves rows of all that have latents of one size,
whatever step each is at. This is the loop alone, without threads: DenoisingEngine drives it.
"""

import time
from collections.abc import Callable

import torch
from denoising_errors import DenoisingError, ForwardError, ForwardMemoryError, NonFiniteError
from denoising_job import Job
from job_priority import priority
from loop_metrics import LoopMetrics
from row_packing import PackedJobs, RowRange, halve
from torch import Tensor
from unet_forward import UNetForward


class DenoisingLoop:
    """Denoises any number of jobs, a forward at a time. Not safe to be used by two threads at once.

    Args:
        unet: Predicts the noise.
        max_frames_per_forward: Rows x latent frames of one forward, at most; one row always fits.
        text_buckets: Token counts to which text is padded.
        metrics: What happens is counted there.
        clock: Seconds; deadlines are on it.

    Attributes:
        jobs: Those that run.
    """

    def __init__(
        self,
        unet: UNetForward,
        max_frames_per_forward: int,
        text_buckets: tuple[int, ...],
        metrics: LoopMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.jobs: list[Job] = []
        self._unet, self._metrics, self._clock = unet, metrics, clock
        self._max_frames, self._text_buckets = max_frames_per_forward, text_buckets
        self._packed: dict[tuple[int, ...], PackedJobs] = {}
        self._finished: list[Job] = []  # not yet returned by `tick`

    @torch.inference_mode()
    def admit(self, job: Job) -> None:
        """Let a job take part from the next tick on."""
        try:
            job.start(self._unet)
        except Exception as error:
            job.abort(_as_denoising_error(error))
        self.jobs.append(job)
        self._packed.pop(job.key, None)

    @torch.inference_mode()
    def tick(self) -> list[Job]:
        """Do one forward, and what it completes; return the jobs that have finished, their futures done."""
        # 1. Jobs whose deadline has passed or that were aborted finish with an error.
        now = self._clock()
        for job in self.jobs:
            if error := job.deadline_error(now):
                job.abort(error)
        for job in [job for job in self.jobs if job.error]:
            self._finish(job)
        if not self.jobs:
            return self._take_finished()
        # 2. The job of the highest priority takes those of its size along.
        ranges = self._choose_rows(now)
        packed = self._pack(ranges[0].job.key)
        # 3. One forward.
        self._forward(packed, ranges)
        # 4. Guidance and scheduler, for the jobs whose rows are complete.
        jobs = [rows.job for rows in ranges if not rows.job.error]
        complete = [job for job in jobs if job.rows_done == job.request.num_rows]
        steps_before = sum(job.steps_done for job in complete)
        packed.advance(complete)
        steps = sum(job.steps_done for job in complete) - steps_before
        self._account(ranges, self._synchronised_clock() - now, steps)
        # 5. Jobs at their last timestep finish with their latents; those that have failed, with an error.
        for job in [rows.job for rows in ranges]:
            if job.error or job.forwards_done == job.num_forwards:
                self._finish(job)
        return self._take_finished()

    def _choose_rows(self, now: float) -> tuple[RowRange, ...]:
        """Return rows of jobs of one size, by priority, as many as fit into a forward; at least one."""
        by_priority = sorted(self.jobs, key=lambda job: priority(job, now), reverse=True)
        key = by_priority[0].key
        room = max(1, self._max_frames // by_priority[0].request.latents_shape[2])
        chosen = {}
        for job in by_priority:
            if job.key == key and room:
                stop = min(job.request.num_rows, job.rows_done + room)
                chosen[job] = RowRange(job, job.rows_done, stop)
                room -= stop - job.rows_done
        return tuple(chosen[job] for job in self.jobs if job in chosen)

    def _pack(self, key: tuple[int, ...]) -> PackedJobs:
        """Return the tensors of all jobs of one size; they are packed anew only after a job came or went."""
        if key not in self._packed:
            jobs = [job for job in self.jobs if job.key == key]
            self._packed[key] = PackedJobs(jobs, self._unet.device, self._text_buckets)
        return self._packed[key]

    def _forward(self, packed: PackedJobs, ranges: tuple[RowRange, ...]) -> None:
        """Predict the noise of all rows. What fails is tried again in halves, down to the row that can't be done."""
        try:
            noise_pred = self._unet(*packed.inputs(ranges))
        except Exception as caught:
            error = caught.with_traceback(None)  # the traceback holds on to the tensors that didn't fit
        else:
            packed.store(ranges, noise_pred)
            return
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
            self._max_frames = min(self._max_frames, _frames(ranges) // 2)
        if sum(map(len, ranges)) == 1:
            ranges[0].job.abort(_as_denoising_error(error))
            return
        for half in halve(ranges):
            if remaining := tuple(rows for rows in half if not rows.job.error):
                self._forward(packed, remaining)

    def _synchronised_clock(self) -> float:
        if self._unet.device.type == "cuda":
            torch.cuda.synchronize(self._unet.device)
        return self._clock()

    def _account(self, ranges: tuple[RowRange, ...], seconds: float, steps: int) -> None:
        for job in self.jobs:
            job.fair_share_s += seconds / len(self.jobs)
        rows_of_all = sum(map(len, ranges))
        for rows in ranges:
            rows.job.used_s += seconds * len(rows) / rows_of_all
        self._metrics.count_forward(rows_of_all, seconds, steps)

    def _finish(self, job: Job) -> None:
        """Remove a job; whatever happens, its future is done afterwards."""
        self.jobs.remove(job)
        self._packed.pop(job.key, None)
        self._finished.append(job)
        error = job.error
        try:
            if not error:
                job.future.set_result(_result(job))
        except Exception as caught:
            error = _as_denoising_error(caught)
        if error:
            job.future.set_exception(error)
        self._metrics.count_request(error)

    def _take_finished(self) -> list[Job]:
        finished, self._finished = self._finished, []
        return finished


def _result(job: Job) -> Tensor:
    latents = job.latents.to("cpu", copy=True)
    if not torch.isfinite(latents).all():
        name = job.request.scheduler.name
        raise NonFiniteError(f"{name} with {job.num_steps} steps gave latents that are not finite.")
    return latents


def _as_denoising_error(error: Exception) -> DenoisingError:
    if isinstance(error, torch.OutOfMemoryError):
        return ForwardMemoryError("the device's memory isn't enough for a single row of this length: ask for less.")
    if isinstance(error, DenoisingError):
        return error
    return ForwardError(f"the UNet failed ({type(error).__name__}: {error}).")


def _frames(ranges: tuple[RowRange, ...]) -> int:
    return sum(len(rows) * rows.job.request.latents_shape[2] for rows in ranges)
