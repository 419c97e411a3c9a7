"""The denoising loop: step-level continuous batching.

At every tick, requests come and go, and one forward of the UNet serves rows of all that have latents of one size,
wherever each is in its own steps. This is the loop alone, without threads: DenoisingEngine drives it.
"""

import time
from collections.abc import Callable

import torch
from denoising_errors import DenoisingError, ForwardError, ForwardMemoryError, NonFiniteError
from denoising_job import Job
from loop_metrics import LoopMetrics
from row_packing import PackedJobs, RowRange, halve
from torch import Tensor
from unet_forward import UNetForward
from urgency import urgency


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
        self._left: list[Job] = []  # not yet returned by `tick`

    @torch.inference_mode()
    def admit(self, job: Job) -> None:
        """Let a job take part from the next tick on."""
        try:
            job.start(self._unet)
        except Exception as error:
            job.drop(_blame(error))
        self.jobs.append(job)
        self._packed.pop(job.key, None)

    @torch.inference_mode()
    def tick(self) -> list[Job]:
        """Do one forward, and the steps that it completes; return the jobs that have ended, their futures done."""
        # 1. Whoever has run out of time or was cancelled, leaves.
        now = self._clock()
        for job in self.jobs:
            if error := job.deadline_error(now):
                job.drop(error)
        for job in [job for job in self.jobs if job.error]:
            self._leave(job)
        if not self.jobs:
            return self._take_left()
        # 2. The most urgent job takes those of its size along.
        ranges = self._choose_rows(now)
        packed = self._pack(ranges[0].job.key)
        # 3. One forward.
        self._forward(packed, ranges)
        # 4. Guidance and scheduler, for the jobs whose rows are complete.
        jobs = [rows.job for rows in ranges if not rows.job.error]
        complete = [job for job in jobs if job.rows_done == job.request.num_rows]
        packed.step(complete)
        self._account(ranges, self._finish_clock() - now, len(complete))
        # 5. Whoever has arrived, leaves; so do those whose forward or step has failed.
        for job in [rows.job for rows in ranges]:
            if job.error or job.forwards_done == job.num_forwards:
                self._leave(job)
        return self._take_left()

    def _choose_rows(self, now: float) -> tuple[RowRange, ...]:
        """Return rows of jobs of one size, the most urgent first, as many as fit into a forward; at least one."""
        by_urgency = sorted(self.jobs, key=lambda job: urgency(job, now), reverse=True)
        key = by_urgency[0].key
        room = max(1, self._max_frames // by_urgency[0].request.latents_shape[2])
        chosen = {}
        for job in by_urgency:
            if job.key == key and room:
                stop = min(job.request.num_rows, job.rows_done + room)
                chosen[job] = RowRange(job, job.rows_done, stop)
                room -= stop - job.rows_done
        return tuple(chosen[job] for job in self.jobs if job in chosen)

    def _pack(self, key: tuple[int, ...]) -> PackedJobs:
        """Return the tensors of all jobs of one size; they are packed anew only after somebody came or went."""
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
            ranges[0].job.drop(_blame(error))
            return
        for half in halve(ranges):
            if remaining := tuple(rows for rows in half if not rows.job.error):
                self._forward(packed, remaining)

    def _finish_clock(self) -> float:
        if self._unet.device.type == "cuda":
            torch.cuda.synchronize(self._unet.device)
        return self._clock()

    def _account(self, ranges: tuple[RowRange, ...], seconds: float, steps: int) -> None:
        for job in self.jobs:
            job.owed_s += seconds / len(self.jobs)
        rows_of_all = sum(map(len, ranges))
        for rows in ranges:
            rows.job.used_s += seconds * len(rows) / rows_of_all
        self._metrics.count_forward(rows_of_all, seconds, steps)

    def _leave(self, job: Job) -> None:
        """End a job; whatever happens, its future is done afterwards."""
        self.jobs.remove(job)
        self._packed.pop(job.key, None)
        self._left.append(job)
        error = job.error
        try:
            if not error:
                job.future.set_result(_result(job))
        except Exception as caught:
            error = _blame(caught)
        if error:
            job.future.set_exception(error)
        self._metrics.count_request(error)

    def _take_left(self) -> list[Job]:
        left, self._left = self._left, []
        return left


def _result(job: Job) -> Tensor:
    latents = job.latents.to("cpu", copy=True)
    if not torch.isfinite(latents).all():
        name = job.request.scheduler.name
        raise NonFiniteError(f"{name} with {job.num_forwards} steps gave latents that are not finite.")
    return latents


def _blame(error: Exception) -> DenoisingError:
    if isinstance(error, torch.OutOfMemoryError):
        return ForwardMemoryError("the device's memory isn't enough for a single row of this length: ask for less.")
    if isinstance(error, DenoisingError):
        return error
    return ForwardError(f"the UNet failed ({type(error).__name__}: {error}).")


def _frames(ranges: tuple[RowRange, ...]) -> int:
    return sum(len(rows) * rows.job.request.latents_shape[2] for rows in ranges)
