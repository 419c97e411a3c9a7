"""The jobs of one latent size, packed so that a forward takes few operations, whatever their number.

From forward to forward nothing comes from the host: indices are written when a job comes or goes, and the cursors in
DenoisingSlots move on by themselves. So all of a tick can be recorded as a CUDA graph.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from denoising_errors import as_denoising_error
from denoising_job import NUM_NOISES, Job
from denoising_slots import BLANK, DenoisingSlots
from device_copies import to_device
from row_seats import Row, RowRange, rearrange
from scheduler_steps import DiffusersSteps
from seated_rows import NUM_INDICES, SeatedRows
from step_table import MAX_MEMORY
from text_conditioning import Conditioning
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Scaled latents, timesteps and text of some rows -> their noise predictions."""

Version = tuple[int, int]
"""Of the slots, and of the seats."""

RESERVED_FORWARDS = 8192
"""In the tables of a batch that is prepared beforehand, of all jobs: 32 with 256 forwards each."""

_SLOT, _LATENTS, _NOISE, _WAVEFORM, _MOVE = range(NUM_INDICES)
"""In `SeatedRows.indices`: by seat, the row's slot, and which of all tensors of the states are its latents and its
noise prediction; by waveform, its slot, and by how much its cursor moves."""


class DenoisingBatch:
    """Jobs with equal keys, and the seats of their rows in a forward.

    Args:
        shape: Channels, frames and bins of a latent.
        device: Where the latents are.
        text_buckets: Text is padded to the smallest of these, to few different shapes.
    """

    def __init__(self, shape: tuple[int, int, int], device: torch.device, text_buckets: tuple[int, ...]) -> None:
        self._device, self._text_buckets = device, text_buckets
        self._slots = DenoisingSlots(shape, device)
        self._ranges: tuple[RowRange, ...] = ()
        self._reserved: dict[int, SeatedRows] = {}  # by tokens
        self._present: SeatedRows | None = None
        self._indexed_slots = 0
        self._neighbours: slice | None = None
        self.rows: list[Row] = []
        self.jobs: list[Job] = []
        self.tokens = 0

    def bucket_of(self, tokens: int) -> int:
        """Return the smallest bucket with room for `tokens`; beyond the largest one, `tokens` itself."""
        return min((bucket for bucket in self._text_buckets if bucket >= tokens), default=tokens)

    @property
    def version(self) -> Version:
        """Of the present tensors: what was recorded with others doesn't hold for who is seated now."""
        return self._slots.version, self._seated.version

    def reserved_version(self, tokens: int) -> Version | None:
        """Return the version that there is whenever reserved seats with so many tokens are used; None without any."""
        seated = self._reserved.get(tokens)
        return (self._slots.version, seated.version) if seated else None

    def admit(self, job: Job) -> None:
        """Give a job its place."""
        self._slots.admit(job)

    def release(self, job: Job) -> None:
        """Take a job's place back. What the device still has to do with it comes before what others do there."""
        self._slots.release(job)

    def reserve(self, text: Conditioning, rows: int, tokens: int) -> None:
        """Make room for what is usual, so that no tensor is replaced later, and have blank rows with some text.

        Rows that fit there sit there from now on, and others elsewhere.

        Args:
            text: Any row's, for its widths and its type.
            rows: Of a forward.
            tokens: T5 states of a row.
        """
        self._slots.reserve(rows, MAX_MEMORY, RESERVED_FORWARDS)
        if tokens not in self._reserved:
            self._reserved[tokens] = SeatedRows(text, rows, tokens)
        self._present = self._reserved[tokens]
        self.rows, self.jobs, self._ranges = [], [], ()
        self._write_indices()
        self.randomize()

    def keep_reserved(self, tokens: Collection[int]) -> None:
        """Reserve no seats any more but those with so many tokens."""
        self._reserved = {count: seated for count, seated in self._reserved.items() if count in tokens}

    def randomize(self) -> None:
        """Give blank rows other latents, and other text."""
        self._slots.randomize()
        self._seated.randomize()

    def seat(self, ranges: tuple[RowRange, ...]) -> None:
        """Seat these rows and no others; it does nothing while they stay the same."""
        if ranges != self._ranges:
            rows = rearrange(self.rows, ranges)
            with self._unseated_if_it_fails():
                self._take_seats(rows)
                self.rows, self.jobs, self._ranges = rows, list(dict.fromkeys(row.job for row in rows)), ranges
                self._write_indices()
        elif self._indexed_slots != self._slots.version:
            self._write_indices()

    def set_input_scales(self) -> None:
        """Set what the latents are multiplied by, of those jobs whose schedulers tell it only now; abort what fails."""
        for job in self.jobs:
            if isinstance(job.steps, DiffusersSteps):
                with _blaming(job):
                    self._slots.set_input_scale(job, job.steps.input_scale(job.forwards_done))

    def inputs(self, seats: slice, tokens: int) -> tuple[Tensor, Tensor, Conditioning]:
        """Return what the UNet needs for the rows of some seats: scaled latents, timesteps, text."""
        slots, indices = self._slots, self._seated.indices
        cursors = slots.cursors.index_select(0, indices[_SLOT, seats])
        timesteps, scales = slots.inputs.index_select(0, cursors).unbind(1)
        latents = slots.states.flatten(0, 1).index_select(0, indices[_LATENTS, seats])
        return latents.mul_(scales[:, None, None, None]), timesteps, self._seated.text_of(seats, tokens)

    def store(self, seats: slice, noise_pred: Tensor) -> None:
        """Keep the UNet's output until all rows of the jobs are done."""
        self._slots.states.flatten(0, 1).index_copy_(0, self._seated.indices[_NOISE, seats], noise_pred)

    def forward_and_advance(self, predict: Predict, rows: int, tokens: int) -> Tensor:
        """Do a forward of so many seats, empty ones included, and a step of all table schedulers; return the noise.

        Nothing of it depends on the host: it can be recorded, and holds for whoever is seated when it is replayed.
        """
        seats, indices = slice(0, rows), self._seated.indices
        noise_pred = predict(*self.inputs(seats, tokens))
        self.store(seats, noise_pred)
        self._advance_slots(indices[_WAVEFORM, seats], indices[_MOVE, seats])
        return noise_pred

    def advance(self, jobs: list[Job]) -> None:
        """Move jobs, all rows of which have gone through the UNet, to their next timestep; abort those that fail."""
        try:
            if jobs == self.jobs and self._neighbours:
                self._advance_neighbours(self._neighbours)
            else:
                self._advance_slots(*self._waveforms_of(jobs))
        except Exception:  # somebody's fault: alone, each shows whose
            for job in jobs:
                with _blaming(job):
                    self._advance_slots(*self._waveforms_of([job]))
        self.count_forward(jobs)

    def count_forward(self, jobs: list[Job]) -> None:
        """Do what is left of a step once the tables have done their part; abort those that fail."""
        for job in jobs:
            if isinstance(job.steps, DiffusersSteps) and not job.error:
                with _blaming(job):
                    self._advance_by_diffusers(job, job.steps)
            job.rows_done = 0
            job.forwards_done += 1

    def _advance_slots(self, index: Tensor, moves: Tensor) -> None:
        """Multiply the state of every waveform, below its noise predictions, by its own matrix; int64 [waveforms]."""
        slots = self._slots
        weights = slots.weights.index_select(0, slots.cursors.index_select(0, index))
        states = slots.states.flatten(2)
        states[:, NUM_NOISES:].index_copy_(0, index, torch.bmm(weights, states.index_select(0, index)))
        slots.cursors.index_add_(0, index, moves)

    def _advance_neighbours(self, span: slice) -> None:
        """Do the same for slots beside each other, where the states needn't be copied together and back."""
        slots = self._slots
        cursors, states = slots.cursors[span], slots.states[span].flatten(2)
        states[:, NUM_NOISES:] = torch.bmm(slots.weights.index_select(0, cursors), states)
        cursors += 1

    def _advance_by_diffusers(self, job: Job, steps: DiffusersSteps) -> None:
        unconditional, with_prompt = job.tensors[:, :NUM_NOISES].unbind(1)
        noise_pred = with_prompt
        if job.is_guided and job.request.guidance_scale is not None:
            noise_pred = unconditional + job.request.guidance_scale * (with_prompt - unconditional)
        job.latents.copy_(steps.step(job.forwards_done, noise_pred, job.latents.clone()))

    def _waveforms_of(self, jobs: list[Job]) -> tuple[Tensor, Tensor]:
        """Return the slots of the jobs' waveforms, and a one for each."""
        count = sum(job.request.num_waveforms for job in jobs)
        if jobs == self.jobs and count <= len(self._seated):
            return self._seated.indices[_WAVEFORM, :count], self._seated.indices[_MOVE, :count]
        slots = torch.tensor([slot for job in jobs for slot in self._slots.slots_of(job)], dtype=torch.int64)
        index = to_device(slots, self._device)
        return index, torch.ones_like(index)

    @property
    def _seated(self) -> SeatedRows:
        if self._present is None:
            raise RuntimeError("no seat has been taken")
        return self._present

    def _take_seats(self, rows: list[Row]) -> None:
        """Move the text of those that change their seat, and write that of newcomers; of all, where all sit anew."""
        self.tokens = self.bucket_of(max(row.job.conditioning.tokens for row in rows))
        seated = self._seats_for(rows)
        seats = {row: seat for seat, row in enumerate(self.rows)} if seated is self._present else {}
        self._present = seated
        moved = [(seats[row], seat) for seat, row in enumerate(rows) if seats.get(row, seat) != seat]
        if moved:
            seated.move(*(self._upload(list(side)) for side in zip(*moved, strict=True)))
        new: dict[Job, list[tuple[int, int]]] = {}
        for seat, row in enumerate(rows):
            if row not in seats:
                new.setdefault(row.job, []).append((seat, row.prompt))
        for job, places in new.items():
            own_seats, prompts = (self._upload(list(side)) for side in zip(*places, strict=True))
            seated.write(own_seats, job.conditioning.rows(prompts))

    def _seats_for(self, rows: list[Row]) -> SeatedRows:
        """Return the narrowest reserved seats where rows fit; else the present ones, or new ones, as wide as they are.

        Reserved ones are never replaced by larger ones: long text and many rows leave the graphs over them as they are.
        """
        tokens, count = self.tokens, len(rows)
        fitting = [seats for seats in self._reserved.values() if seats.tokens >= tokens and len(seats) >= count]
        if fitting:
            return min(fitting, key=lambda seats: seats.tokens)
        present = self._present
        if present and present.tokens == tokens and len(present) >= count:
            return present
        return SeatedRows(rows[0].job.conditioning, _power_of_two(count), tokens)

    def _write_indices(self) -> None:
        size, tensors = len(self._seated), self._slots.tensors_per_slot
        by_seat = [
            (slot, slot * tensors + NUM_NOISES, slot * tensors + row.noise)
            for row in self.rows
            for slot in [self._slots.slots_of(row.job)[row.waveform]]
        ]
        by_seat += [(BLANK, BLANK * tensors + NUM_NOISES, BLANK * tensors)] * (size - len(by_seat))
        occupied = [slot for job in self.jobs for slot in self._slots.slots_of(job)]
        self._neighbours = _span_of(occupied)
        by_waveform = [(slot, 1) for slot in occupied][:size]
        by_waveform += [(BLANK, 0)] * (size - len(by_waveform))
        columns = [*zip(*by_seat, strict=True), *zip(*by_waveform, strict=True)]
        self._seated.indices.copy_(self._upload(columns))
        self._indexed_slots = self._slots.version

    def _upload(self, values: list[Any]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self._device)

    @contextlib.contextmanager
    def _unseated_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.rows, self.jobs, self._ranges = [], [], ()
            raise


@contextlib.contextmanager
def _blaming(job: Job) -> Iterator[None]:
    """Abort a job whose own computation fails, and go on."""
    try:
        yield
    except Exception as error:
        job.abort(as_denoising_error(error))


def _span_of(slots: list[int]) -> slice | None:
    """Return the span that these slots fill in their order; None where they fill none."""
    if slots and slots == list(range(slots[0], slots[0] + len(slots))):
        return slice(slots[0], slots[0] + len(slots))
    return None


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
