"""Packs jobs with latents of one size, so that a forward takes few operations, whatever their number."""

from dataclasses import dataclass

import numpy as np
import torch
from denoising_errors import DenoisingError
from denoising_job import NUM_NOISES, Job
from scheduler_steps import LinearSteps
from text_conditioning import Conditioning, concatenate
from torch import Tensor


@dataclass(frozen=True)
class RowRange:
    """Consecutive rows of a job."""

    job: Job
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def halve(ranges: tuple[RowRange, ...]) -> tuple[tuple[RowRange, ...], tuple[RowRange, ...]]:
    """Return the first and the second half of the rows."""
    room = sum(map(len, ranges)) // 2
    first, second = [], []
    for rows in ranges:
        cut = min(rows.stop, rows.start + room)
        room -= cut - rows.start
        first.append(RowRange(rows.job, rows.start, cut))
        second.append(RowRange(rows.job, cut, rows.stop))
    return tuple(filter(len, first)), tuple(filter(len, second))


class PackedJobs:
    """The tensors of jobs of one size, in one block of memory; what the jobs have are views into it.

    Args:
        jobs: With equal keys. Their tensors are moved here.
        device: Where the latents are.
        text_buckets: Text is padded to the smallest of these, to few different shapes.
    """

    def __init__(self, jobs: list[Job], device: torch.device, text_buckets: tuple[int, ...]) -> None:
        self._device, self._text_buckets = device, text_buckets
        self._memory = max(job.steps.memory for job in jobs)
        starts = np.cumsum([0, *(job.request.num_waveforms for job in jobs)])
        self._waveforms = {job: slice(*span) for job, *span in zip(jobs, starts, starts[1:], strict=False)}
        shape = jobs[0].tensors.shape[2:]
        self._packed = torch.zeros(int(starts[-1]), NUM_NOISES + self._memory, *shape, device=device)
        for job, span in self._waveforms.items():
            view = self._packed[span, : NUM_NOISES + job.steps.memory]
            view.copy_(job.tensors)
            job.tensors = view
        self._slots = self._packed.flatten(0, 1)
        self._selection: _Selection | None = None

    def inputs(self, ranges: tuple[RowRange, ...]) -> tuple[Tensor, Tensor, Conditioning]:
        """Return what the UNet needs for these rows: scaled latents, timesteps, conditioning."""
        selection = self._select(ranges)
        timesteps = self._per_row(ranges, [rows.job.steps.timesteps[rows.job.forwards_done] for rows in ranges])
        scales = self._per_row(ranges, [rows.job.steps.input_scale(rows.job.forwards_done) for rows in ranges])
        latents = self._slots.index_select(0, selection.latents)
        return latents.mul_(scales[:, None, None, None]), timesteps, selection.conditioning

    def store(self, ranges: tuple[RowRange, ...], noise_pred: Tensor) -> None:
        """Keep the UNet's output until all rows of the jobs are done."""
        self._slots.index_copy_(0, self._select(ranges).noise, noise_pred)
        for rows in ranges:
            rows.job.rows_done += len(rows)

    def advance(self, jobs: list[Job]) -> None:
        """Move `jobs`, all rows of which have gone through the UNet, to their next timestep; abort those that fail."""
        linear = [job for job in jobs if isinstance(job.steps, LinearSteps)]
        if linear:
            self._advance_linear(linear)
        for job in jobs:
            if job not in linear:
                self._advance_by_diffusers(job)
            job.rows_done = 0
            job.forwards_done += 1

    def _per_row(self, ranges: tuple[RowRange, ...], values: list[float]) -> Tensor:
        repeated = np.repeat(np.array(values, np.float32), [len(rows) for rows in ranges])
        return torch.from_numpy(repeated).to(self._device)

    def _advance_linear(self, jobs: list[Job]) -> None:
        """Multiply every waveform's state, below its noise predictions, by its own matrix."""
        memory = self._memory
        weights = np.zeros((len(self._packed), memory, NUM_NOISES + memory), np.float32)
        weights[:, :, NUM_NOISES:] = np.eye(memory, dtype=np.float32)
        for job in jobs:
            own = job.steps.memory
            weights[self._waveforms[job], :own, : NUM_NOISES + own] = job.guided_coefficients()
        flat = self._packed.flatten(2)
        flat[:, NUM_NOISES:] = torch.bmm(torch.from_numpy(weights).to(self._device), flat)

    def _advance_by_diffusers(self, job: Job) -> None:
        unconditional, with_prompt = job.tensors[:, :NUM_NOISES].unbind(1)
        noise_pred = with_prompt
        if job.request.guidance_scale is not None:
            noise_pred = unconditional + job.request.guidance_scale * (with_prompt - unconditional)
        try:
            job.latents.copy_(job.steps.step(job.forwards_done, noise_pred, job.latents.clone()))  # type: ignore[union-attr]
        except DenoisingError as error:
            job.abort(error)

    def _select(self, ranges: tuple[RowRange, ...]) -> "_Selection":
        """Return where these rows are; it is the same from forward to forward while no job comes or goes."""
        if self._selection is None or self._selection.ranges != ranges:
            self._selection = self._make_selection(ranges)
        return self._selection

    def _make_selection(self, ranges: tuple[RowRange, ...]) -> "_Selection":
        slots_per_waveform = NUM_NOISES + self._memory
        first_slots, halves, conditionings = [], [], []
        for rows in ranges:
            job = rows.job
            index = torch.arange(rows.start, rows.stop)
            rows_per_waveform = job.request.rows_per_waveform
            first_slots.append((self._waveforms[job].start + index // rows_per_waveform) * slots_per_waveform)
            halves.append(index % 2 if rows_per_waveform == 2 else torch.ones_like(index))
            prompts = job.prompt_of_row()[rows.start : rows.stop]
            conditionings.append(job.conditioning.rows(prompts.to(self._device)))
        slots = torch.cat(first_slots)
        longest = max(conditioning.tokens for conditioning in conditionings)
        return _Selection(
            ranges=ranges,
            latents=(slots + NUM_NOISES).to(self._device),
            noise=(slots + torch.cat(halves)).to(self._device),
            conditioning=concatenate(conditionings, bucket_of(longest, self._text_buckets)),
        )


@dataclass(frozen=True)
class _Selection:
    """Where rows are.

    Attributes:
        ranges: The rows.
        latents, noise: int64 [rows], the slot of each.
        conditioning: Of the rows.
    """

    ranges: tuple[RowRange, ...]
    latents: Tensor
    noise: Tensor
    conditioning: Conditioning


def bucket_of(tokens: int, buckets: tuple[int, ...]) -> int:
    """Return the smallest bucket with room for `tokens`; beyond the largest one, `tokens` itself."""
    return min((bucket for bucket in buckets if bucket >= tokens), default=tokens)
