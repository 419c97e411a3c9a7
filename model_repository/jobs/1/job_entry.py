"""One request on the job board: what its file holds, and the stage's view of it."""

import os
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

STATES = ("queued", "denoising", "decoding", "done", "failed", "cancelled")
FINISHED = ("done", "failed", "cancelled")
DENOISED = ("decoding", "done")

FINISHED_TTL_S = 60.0
"""How long it can be seen how a request has ended."""
LIVE_TTL_S = 3600.0
"""A request of which nothing is heard for so long is forgotten. The longest silence of a live one is its decoding."""
HEARTBEAT_S = 60.0
"""How often a stage writes what hasn't changed."""

_RECORD = struct.Struct("<qdiiiB")  # ticket, when it was written, step, total steps, requests ahead, state
_CANCELLED_AT = _RECORD.size  # a byte of its own, so that no report undoes it
_SIZE = _RECORD.size + 1


@dataclass(frozen=True)
class JobStatus:
    """How far a request is.

    Attributes:
        state: One of STATES, or `unknown`.
        step: Scheduler steps that are done.
        total_steps: The request's num_inference_steps; 0 while that isn't known.
        requests_ahead: Requests before it in the queue; 0 once it is denoised.
    """

    state: str = "unknown"
    step: int = 0
    total_steps: int = 0
    requests_ahead: int = 0


@dataclass(frozen=True)
class JobRecord:
    """What a file holds, but for the byte that cancels.

    Attributes:
        ticket: Of the request that the file belongs to, not 0.
        written_s: On the monotonic clock, which all processes of a machine share.
        status: How far it is.
    """

    ticket: int
    written_s: float
    status: JobStatus

    @property
    def is_live(self) -> bool:
        """Whether the request isn't over."""
        return self.status.state not in FINISHED

    def is_expired(self, now: float) -> bool:
        """Whether it has been kept for long enough, and counts as unknown."""
        return now >= self.written_s + (LIVE_TTL_S if self.is_live else FINISHED_TTL_S)

    def write(self, file: int) -> None:
        """Write it over the one before, in a single small call."""
        status = self.status
        numbers = (status.step, status.total_steps, status.requests_ahead, STATES.index(status.state))
        os.pwrite(file, _RECORD.pack(self.ticket, self.written_s, *numbers), 0)

    @classmethod
    def read(cls, file: int) -> "JobRecord | None":
        """Return what a file holds; None if it isn't an entry, or not yet."""
        content = os.pread(file, _SIZE, 0)
        if len(content) < _SIZE:
            return None
        ticket, written_s, step, total_steps, requests_ahead, state = _RECORD.unpack_from(content)
        return cls(ticket, written_s, JobStatus(STATES[state], step, total_steps, requests_ahead))


def set_cancelled(file: int, cancelled: bool) -> None:
    """Write the byte that cancels."""
    os.pwrite(file, bytes([cancelled]), _CANCELLED_AT)


class JobEntry:
    """A live request on the board, as the stage that has it sees it. Its methods are safe from any thread.

    An entry without a file does nothing: a request goes on without the board. As a context manager it is closed in the
    end, and the request has failed if an exception leaves the block.

    Args:
        file: Descriptor, which is the entry's from now on; None for an entry that does nothing.
        record: What the file holds.
        clock: Seconds, the same for all processes.
    """

    def __init__(
        self,
        file: int | None = None,
        record: JobRecord = JobRecord(0, 0.0, JobStatus()),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file, self._record, self._clock = file, record, clock
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind:
            self.end("failed")
        self.close()

    @property
    def ticket(self) -> int:
        """For the stages to come; 0 if there is no file."""
        return self._record.ticket

    def is_cancelled(self) -> bool:
        """Whether the request has been cancelled."""
        with self._lock:
            return self._file is not None and os.pread(self._file, 1, _CANCELLED_AT) == b"\1"

    def report(self, state: str, step: int = 0, total_steps: int = 0, requests_ahead: int = 0) -> None:
        """Write how far the request is (JobStatus has the arguments); what hasn't changed isn't written."""
        self._report(JobStatus(state, step, total_steps, requests_ahead))

    def end(self, state: str) -> None:
        """Write how the request leaves this stage, and close the entry."""
        with self._lock:  # throughout: no report comes after the last one
            last = self._record.status
            step = last.total_steps if state in DENOISED else last.step
            self._report(JobStatus(state, step, last.total_steps))
            self.close()

    def close(self) -> None:
        """Leave the entry as it is; what is reported later does nothing."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _report(self, status: JobStatus) -> None:
        with self._lock:
            now = self._clock()
            if self._file is None or (status == self._record.status and now < self._record.written_s + HEARTBEAT_S):
                return
            self._record = replace(self._record, written_s=now, status=status)
            self._record.write(self._file)
