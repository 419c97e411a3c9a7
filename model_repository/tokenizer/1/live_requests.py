"""The requests of the ensemble that aren't over: what they occupy, and how each of them has ended.

Every request is added when it is let in, and then looked at through its entry on the job board, which all stages write.
Nothing but these entries is read, by a look into memory. What has ended is handed over once, to be counted and logged;
so is a request that no stage has answered for, because one that reports nothing has failed, or because Triton has ended
it between two stages: it does so where a gRPC request is cancelled.
"""

from __future__ import annotations  # the job board's modules are found only after this one is imported

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from admission import OVERTAKEN_SILENCE_S, Budgets, Load, occupied, silence_limit_s
from generation_request import GenerationRequest

if TYPE_CHECKING:
    from job_board import JobBoard
    from job_entry import JobEntry, JobRecord, JobView


@dataclass(frozen=True)
class EndedRequest:
    """A request that is over.

    Attributes:
        request_id: As the client gave it; empty for none.
        ticket: Of its entry on the job board; 0 for none.
        reason: One of job_entry.REASONS.
        seconds: How long each part took that it came to: `text`, `queue`, `denoise`, `decode`, `total`.
        request: What was asked for; None where it couldn't be read.
        requests_ahead: Those that were live when it came.
    """

    request_id: str
    ticket: int
    reason: str
    seconds: dict[str, float]
    request: GenerationRequest | None = None
    requests_ahead: int = 0


@dataclass(eq=False)
class _LiveRequest:
    request_id: str
    view: JobView
    load: Load
    request: GenerationRequest
    requests_ahead: int
    stage: str = ""
    load_at_stage: Load = field(default_factory=Load)
    given_up_s: float | None = None

    def note_given_up(self, record: JobRecord, now: float) -> bool:
        """Say whether nobody waits for it any more, and keep since when."""
        deadline = record.deadline_unix_us
        is_given_up = self.view.is_cancelled() or bool(deadline and time.time_ns() // 1000 >= deadline)
        if is_given_up and self.given_up_s is None:
            self.given_up_s = now
        return is_given_up


class _Furthest:
    """How far the latest request has come, of those that went through the text stages, and through the last ones.

    Each of these stages takes the requests in their order.
    """

    def __init__(self) -> None:
        self._encoded_s = self._decoded_s = 0.0  # when it had arrived; when it had left the loop

    def note(self, record: JobRecord) -> None:
        if record.times.encoded_s:
            self._encoded_s = max(self._encoded_s, record.times.arrived_s)
        if record.reason == "ok":
            self._decoded_s = max(self._decoded_s, record.times.decoding_s)

    def has_passed(self, record: JobRecord) -> bool:
        """Say whether a later request is through the stages in which this one is."""
        if record.times.decoding_s:
            return record.times.decoding_s < self._decoded_s
        return not record.times.encoded_s and record.times.arrived_s < self._encoded_s


class LiveRequests:
    """Those of one ensemble. Safe to be used by several threads.

    Args:
        budgets: What they may occupy.
        board: Where a lost request's entry is ended.
        clock: Seconds, the board's.
    """

    def __init__(self, budgets: Budgets, board: JobBoard, clock: Callable[[], float] = time.monotonic) -> None:
        self._budgets, self._board, self._clock = budgets, board, clock
        self._live: list[_LiveRequest] = []
        self._ended: list[EndedRequest] = []
        self._furthest = _Furthest()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._live)

    def load(self) -> Load:
        """Return what all requests occupy now."""
        with self._lock:
            return self._look()

    def admit(self, load: Load, request: GenerationRequest, entry: JobEntry, request_id: str) -> None:
        """Let a request in, and watch it from now on. Without a file for its entry it isn't watched.

        Raises:
            ServerBusyError: There is no room for it.
        """
        with self._lock:
            self._budgets.check(self._look(), load)
            if view := entry.view():
                self._live.append(_LiveRequest(request_id, view, load, request, len(self._live)))

    def add_refused(self, request_id: str, record: JobRecord, request: GenerationRequest | None) -> None:
        """Report a request that ended where it came in.

        Args:
            request_id: The client's.
            record: Of its entry, which is ended.
            request: What was asked for, as far as it could be read.
        """
        with self._lock:
            self._look()
            self._ended.append(_ended(request_id, record, request, len(self._live)))

    def take_ended(self) -> list[EndedRequest]:
        """Return the requests that have ended since the last call."""
        with self._lock:
            self._look()
            taken, self._ended = self._ended, []
            return taken

    def _look(self) -> Load:
        """Part with what has ended; return what the others occupy."""
        total, still_live = Load(), []
        records = [(live, live.view.record()) for live in self._live]
        for live, record in records:
            if record.is_live:
                still_live.append(live)
                total += occupied(live.load, record, live.note_given_up(record, self._clock()))
                self._furthest.note(record)
            else:
                record = live.view.record()  # again: the state is written last
                self._furthest.note(record)
                self._ended.append(_ended(live.request_id, record, live.request, live.requests_ahead))
                live.view.close()
        self._live = still_live
        for live, record in records:
            if record.is_live:
                self._end_if_lost(live, record, total)
        return total

    def _end_if_lost(self, live: _LiveRequest, record: JobRecord, total: Load) -> None:
        """End the entry of a request of which nothing is heard; the next look finds it ended."""
        stage = _stage(record)
        if stage != live.stage:
            live.stage, live.load_at_stage = stage, total
        elif self._clock() >= max(record.written_s, live.given_up_s or 0.0) + self._silence_limit_s(live, record):
            state, reason = _lost_state(live)
            self._board.open_entry(live.request_id, record.ticket).end(state, reason)

    def _silence_limit_s(self, live: _LiveRequest, record: JobRecord) -> float:
        is_given_up = live.given_up_s is not None
        if is_given_up and self._furthest.has_passed(record):
            return OVERTAKEN_SILENCE_S
        ahead = Load() if live.view.is_dropped() else live.load_at_stage
        return silence_limit_s(record, ahead, is_given_up)


def _lost_state(live: _LiveRequest) -> tuple[str, str]:
    """Return how a request has ended that no stage has ended."""
    if live.given_up_s is None:
        return "failed", "INTERNAL"
    return ("cancelled", "CANCELLED") if live.view.is_cancelled() else ("failed", "DEADLINE")


def _stage(record: JobRecord) -> str:
    return "decode" if record.times.decoding_s else "denoise" if record.times.encoded_s else "text"


def _ended(request_id: str, record: JobRecord, request: GenerationRequest | None, requests_ahead: int) -> EndedRequest:
    return EndedRequest(request_id, record.ticket, record.reason, record.times.seconds(), request, requests_ahead)
