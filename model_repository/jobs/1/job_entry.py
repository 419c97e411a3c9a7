"""One request on the job board: what its file holds, and the stage's view of it."""

import mmap
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

REASONS = ("", "ok", "INVALID_ARG", "UNAVAILABLE", "DEADLINE", "CANCELLED", "INTERNAL")
"""Why a request is over: the contract's tags; empty while it is live."""
_USUAL_REASONS = {"done": "ok", "failed": "INTERNAL", "cancelled": "CANCELLED"}

FINISHED_TTL_S = 60.0
"""How long it can be seen how a request has ended."""
LIVE_TTL_S = 3600.0
"""A request of which nothing is heard for so long is forgotten. The longest silence of a live one is its decoding."""
HEARTBEAT_S = 60.0
"""How often a stage writes what hasn't changed."""

# Ticket, when it was written, deadline, step, total steps, requests ahead, the five times, whether the id is shared,
# reason, state: the last one, so that those who see the end see what stands before it.
_RECORD = struct.Struct("<qdqiii5d?BB")
_DROPPED_AT = _RECORD.size  # these have bytes of their own, so that no report undoes them
_CANCELLED_AT = _RECORD.size + 1  # the last one: who writes it makes the file complete
_SIZE = _RECORD.size + 2


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
class JobTimes:
    """When a request came to each part of its way, on the monotonic clock; 0 for what it hasn't come to.

    Attributes:
        arrived_s: At the first stage.
        encoded_s: Its text is encoded: it has come to the queue of the denoising loop.
        denoising_s: There was room for it in the loop.
        decoding_s: Its last step was done.
        ended_s: It is over, in whatever way.
    """

    arrived_s: float = 0.0
    encoded_s: float = 0.0
    denoising_s: float = 0.0
    decoding_s: float = 0.0
    ended_s: float = 0.0

    def seconds(self) -> dict[str, float]:
        """Return how long each part took that the request came to; `total` where it is over."""
        ways = {
            "text": (self.arrived_s, self.encoded_s),
            "queue": (self.encoded_s, self.denoising_s),
            "denoise": (self.denoising_s, self.decoding_s),
            "decode": (self.decoding_s, self.ended_s),
            "total": (self.arrived_s, self.ended_s),
        }
        return {name: (end or self.ended_s) - start for name, (start, end) in ways.items() if start and self.ended_s}


@dataclass(frozen=True)
class JobRecord:
    """What a file holds, but for the byte that cancels, and the one that says that Triton has dropped it.

    Attributes:
        ticket: Of the request that the file belongs to, not 0.
        written_s: On the monotonic clock, which all processes of a machine share.
        status: How far it is.
        times: When it came there.
        deadline_unix_us: When the client's time is up; 0 for never.
        is_id_shared: Whether another live request had the same id when this one came.
        reason: One of REASONS.
    """

    ticket: int
    written_s: float
    status: JobStatus
    times: JobTimes = JobTimes()
    deadline_unix_us: int = 0
    is_id_shared: bool = False
    reason: str = ""

    @property
    def is_live(self) -> bool:
        """Whether the request isn't over."""
        return self.status.state not in FINISHED

    def is_expired(self, now: float) -> bool:
        """Whether it has been kept for long enough, and counts as unknown."""
        return now >= self.written_s + (LIVE_TTL_S if self.is_live else FINISHED_TTL_S)

    def write(self, file: int) -> None:
        """Write it over the one before, in a single small call."""
        status, times = self.status, self.times
        content = _RECORD.pack(
            *(self.ticket, self.written_s, self.deadline_unix_us),
            *(status.step, status.total_steps, status.requests_ahead),
            *(times.arrived_s, times.encoded_s, times.denoising_s, times.decoding_s, times.ended_s),
            *(self.is_id_shared, REASONS.index(self.reason), STATES.index(status.state)),
        )
        os.pwrite(file, content, 0)

    @classmethod
    def read(cls, file: int) -> "JobRecord | None":
        """Return what a file holds; None if it isn't an entry, or not yet."""
        content = os.pread(file, _SIZE, 0)
        return cls._unpack(content) if len(content) == _SIZE else None

    @classmethod
    def _unpack(cls, content: bytes | mmap.mmap) -> "JobRecord":
        ticket, written_s, deadline, *status, a, b, c, d, e, is_shared, reason, state = _RECORD.unpack_from(content)
        return cls(
            *(ticket, written_s, JobStatus(STATES[state], *status), JobTimes(a, b, c, d, e)),
            *(deadline, is_shared, REASONS[reason]),
        )


def set_cancelled(file: int, cancelled: bool) -> None:
    """Write the byte that cancels."""
    os.pwrite(file, bytes([cancelled]), _CANCELLED_AT)


def set_dropped(file: int) -> None:
    """Write that Triton has ended the request by itself."""
    os.pwrite(file, b"\1", _DROPPED_AT)


class JobView:
    """Shows what the file of an entry holds, without a call of the system: it is mapped into memory.

    It needs no descriptor, and goes on showing a file that was removed from the board.
    """

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, _SIZE, mmap.MAP_SHARED, mmap.PROT_READ)

    def record(self) -> JobRecord:
        """Return what the file holds."""
        return JobRecord._unpack(self._memory)

    def is_cancelled(self) -> bool:
        """Whether the request has been cancelled."""
        return self._memory[_CANCELLED_AT] == 1

    def is_dropped(self) -> bool:
        """Whether Triton has ended it by itself: no stage has it, but for the one that computes it at that moment."""
        return self._memory[_DROPPED_AT] == 1

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


class JobEntry:
    """A live request on the board, as the stage that has it sees it. Its methods are safe from any thread.

    An entry without a file does nothing: a request goes on without the board. As a context manager it is closed in the
    end, and the request has failed if an exception leaves the block.

    Args:
        file: Descriptor, which is the entry's from now on; None for an entry that does nothing.
        record: What the file holds.
        clock: Seconds, the same for all processes.
        was_cancelled: Of an entry that does nothing, whether its request has ended as cancelled.
    """

    def __init__(
        self,
        file: int | None = None,
        record: JobRecord = JobRecord(0, 0.0, JobStatus()),
        clock: Callable[[], float] = time.monotonic,
        *,
        was_cancelled: bool = False,
    ) -> None:
        self._file, self._record, self._clock = file, record, clock
        self._was_cancelled = was_cancelled
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

    @property
    def record(self) -> JobRecord:
        """What this stage knows of the request."""
        return self._record

    def view(self) -> JobView | None:
        """Return what shows the request's way through all stages; None if there is no file."""
        with self._lock:
            return JobView(self._file) if self._file is not None else None

    def is_cancelled(self) -> bool:
        """Whether the request has been cancelled."""
        with self._lock:
            if self._file is None:
                return self._was_cancelled
            return os.pread(self._file, 1, _CANCELLED_AT) == b"\1"

    def enter_queue(self) -> None:
        """Write that the text is encoded, and that the request has come to the queue of the denoising loop."""
        with self._lock:
            self._note(encoded_s=self._clock())
            self._write(self._record.status)

    def start_denoising(self) -> None:
        """Remember when there was room in the loop; the next report writes it. Takes a microsecond."""
        with self._lock:
            self._note(denoising_s=self._clock())

    def report(self, state: str, step: int = 0, total_steps: int = 0, requests_ahead: int = 0) -> None:
        """Write how far the request is (JobStatus has the arguments); what hasn't changed isn't written."""
        self._report(JobStatus(state, step, total_steps, requests_ahead))

    def end(self, state: str, reason: str = "") -> None:
        """Write how the request leaves this stage, and close the entry.

        Args:
            state: `decoding`, or one of FINISHED.
            reason: One of REASONS; if empty, the one that the state usually has.
        """
        with self._lock:  # throughout: no report comes after the last one
            last = self._record.status
            step = last.total_steps if state in DENOISED else last.step
            self._note(**{"ended_s" if state in FINISHED else "decoding_s": self._clock()})
            self._record = replace(self._record, reason=reason or _USUAL_REASONS.get(state, ""))
            self._write(JobStatus(state, step, last.total_steps))
            self.close()

    def close(self) -> None:
        """Leave the entry as it is; what is reported later does nothing."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _report(self, status: JobStatus) -> None:
        with self._lock:
            if status != self._record.status or self._clock() >= self._record.written_s + HEARTBEAT_S:
                self._write(status)

    def _write(self, status: JobStatus) -> None:
        if self._file is not None:
            self._record = replace(self._record, written_s=self._clock(), status=status)
            self._record.write(self._file)

    def _note(self, **times: float) -> None:
        """Keep when the request came somewhere."""
        self._record = replace(self._record, times=replace(self._record.times, **times))
