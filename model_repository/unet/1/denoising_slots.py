"""Where the jobs of one latent size have their state and their steps, on the device, from admission to the end.

A job's whole way from noise to result is written there when it is admitted. A step then needs no number from the host:
each waveform's cursor points at the row of the tables that comes next.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from denoising_job import NUM_NOISES, Job
from device_copies import to_device
from scheduler_steps import LinearSteps
from span_allocator import SpanAllocator
from torch import Tensor

BLANK = 0
"""The slot of nobody, for rows that fill a batch up; and the row of the tables that changes nothing."""

FIRST_ROWS = 256
"""Of the tables; they are enlarged as needed."""


_VERSIONS = itertools.count(1)
"""Of all slots together: two never have the same one."""


@dataclass(frozen=True)
class _Place:
    """Where a job is.

    Attributes:
        slots: Of its waveforms.
        rows: Of its forwards, in the tables.
    """

    slots: range
    rows: range


class DenoisingSlots:
    """Slots for waveforms of one size, and tables for the steps of their jobs.

    Args:
        shape: Channels, frames and bins of a latent.
        device: Where it all is.

    Attributes:
        states: float32 [slots, 2 + memory, channels, frames, bins]: the two noise predictions, the latents, and what
            else a scheduler remembers.
        inputs: float32 [rows, 2]: what the UNet gets as timestep, and what the latents are multiplied by before it.
        weights: float32 [rows, memory, 2 + memory], of a state for the next latents and what is remembered.
        cursors: int64 [slots], the row of `inputs` and `weights` that a waveform's next forward has.
        version: Another one when tensors were replaced by larger ones: whoever kept them has stale ones.
    """

    states: Tensor
    inputs: Tensor
    weights: Tensor
    cursors: Tensor

    def __init__(self, shape: tuple[int, int, int], device: torch.device) -> None:
        self._shape, self._device = shape, device
        self._places: dict[Job, _Place] = {}
        self._slots, self._rows = SpanAllocator(0), SpanAllocator(0)
        self._memory = 0
        self.version = 0
        self.reserve(slots=1, memory=1)
        self._slots.take(1 + BLANK)
        self._rows.take(1 + BLANK)

    @property
    def tensors_per_slot(self) -> int:
        """Tensors of a state."""
        return NUM_NOISES + self._memory

    def slots_of(self, job: Job) -> range:
        """Return the slots of a job's waveforms."""
        return self._places[job].slots

    def reserve(self, slots: int, memory: int, rows: int = FIRST_ROWS) -> None:
        """Make room for so many waveforms, tensors that a scheduler remembers, and forwards: none is replaced then."""
        self._resize(max(1 + slots, self._slots.size), max(rows, self._rows.size), max(memory, self._memory))

    def randomize(self) -> None:
        """Give nobody's slot other latents."""
        self.states[BLANK].zero_()  # what isn't finite would stay so
        self.states[BLANK, NUM_NOISES].normal_()

    def admit(self, job: Job) -> None:
        """Give a job its place, with its noise and all of its steps."""
        self._make_room(job)
        slots, rows = self._slots.take(job.request.num_waveforms), self._rows.take(job.num_forwards)
        self._places[job] = _Place(slots, rows)
        self._set_view(job)
        self.states[slots.start : slots.stop].zero_()
        job.latents.copy_(to_device(job.steps.noise(job.request.latents_shape), self._device))
        self._write_steps(job, rows)
        self.cursors[slots.start : slots.stop].fill_(rows.start)

    def release(self, job: Job) -> None:
        """Take a job's place back; nothing if it has none."""
        if place := self._places.pop(job, None):
            self._slots.give_back(place.slots)
            self._rows.give_back(place.rows)

    def set_input_scale(self, job: Job, scale: float) -> None:
        """Set what the latents are multiplied by before the next forward, where only that moment tells."""
        self.inputs[self._places[job].rows[job.forwards_done], 1].fill_(scale)

    def _write_steps(self, job: Job, rows: range) -> None:
        inputs = np.ones((len(rows), 2), np.float32)
        weights = np.zeros((len(rows), self._memory, self.tensors_per_slot), np.float32)
        inputs[:, 0] = job.steps.timesteps
        if isinstance(job.steps, LinearSteps):
            own = job.steps.memory
            inputs[:, 1] = job.steps.table.input_scales
            weights[:, :own, : NUM_NOISES + own] = job.guided(job.steps.table.coefficients)
        else:
            weights[:, 0, NUM_NOISES] = 1.0  # the latents stay as they are: diffusers' class moves them
        for table, values in ((self.inputs, inputs), (self.weights, weights)):
            table[rows.start : rows.stop].copy_(to_device(torch.from_numpy(values), self._device))

    def _make_room(self, job: Job) -> None:
        """Enlarge what is too small for a job; each time at least twice, so that it is seldom."""
        slots, rows = self._slots.size, self._rows.size
        if not self._slots.has(job.request.num_waveforms):
            slots = max(2 * slots, slots + job.request.num_waveforms)
        if not self._rows.has(job.num_forwards):
            rows = max(2 * rows, rows + job.num_forwards)
        self._resize(slots, rows, max(self._memory, job.steps.memory))

    def _resize(self, slots: int, rows: int, memory: int) -> None:
        old_slots, old_rows, old_memory = self._slots.size, self._rows.size, self._memory
        if (slots, rows, memory) == (old_slots, old_rows, old_memory):
            return
        tensors = NUM_NOISES + memory
        states = torch.zeros(slots, tensors, *self._shape, device=self._device)
        inputs = torch.ones(rows, 2, device=self._device)
        weights = torch.zeros(rows, memory, tensors, device=self._device)
        cursors = torch.full((slots,), BLANK, device=self._device)
        if old_slots:
            states[:old_slots, : NUM_NOISES + old_memory].copy_(self.states)
            inputs[:old_rows].copy_(self.inputs)
            weights[:old_rows, :old_memory, : NUM_NOISES + old_memory].copy_(self.weights)
            cursors[:old_slots].copy_(self.cursors)
        else:
            states[BLANK, NUM_NOISES].copy_(to_device(torch.randn(self._shape), self._device))
            weights[BLANK, 0, NUM_NOISES].fill_(1.0)
        self.states, self.inputs, self.weights, self.cursors = states, inputs, weights, cursors
        self._slots.grow(slots)
        self._rows.grow(rows)
        self._memory = memory
        self.version = next(_VERSIONS)
        for job in self._places:
            self._set_view(job)

    def _set_view(self, job: Job) -> None:
        slots = self._places[job].slots
        job.tensors = self.states[slots.start : slots.stop, : NUM_NOISES + job.steps.memory]
