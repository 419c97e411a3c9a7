"""Notice within a fraction of a second that tritonserver or one of its stages is dead or stalled.

Triton 2.51 stays "ready" with a dead stage, and after a stage that stood still for about a second it gives the next
request the tensors of the one before, and then aborts. So a stage that stands still is a fault before that second is
over, and the server has to be killed and started again.

A stage that computes doesn't look like that: see `server/stubs.py` for the thread that runs all the same.
"""

import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from server.errors import ServerError
from server.stubs import (
    DEAD_STATES,
    HEARTBEAT_S,
    STOPPED_STATES,
    Stub,
    Thread,
    ending_signal,
    parent_of,
    process_ids,
    stub_of,
    switches_of_all_threads,
    thread_ids,
)

CHECK_INTERVAL_S = 0.1
"""How often `Watchdog.check` wants to be called."""

STOPPED_S = 0.1
"""So long a process may be stopped: debuggers and profilers stop one for a moment."""
SILENCE_S = 0.7
"""So long a stage's heartbeat may fail. Triton looks every second, and the last beat may be 0.3 s before the stop."""
SERVER_SILENCE_S = 4.0
"""So long no thread of tritonserver may run: those of gRPC wake every second."""
MAX_STEP_S = 0.2
"""Of a longer time between two checks no more than this counts as time in which a process could have run."""
GAP_S = 1.0
"""After more than this without a check the stages may have stood still as well, with all that it does to Triton."""
ENOUGH_BEATS = 0.5
"""Of the beats that were due in that time; being stopped and going on count as one each. A machine that is only busy
lets more of them through, and the one who asks may be busy itself: a program that holds Python's lock."""

SERVER = "tritonserver"
STALLED = "stalled"
MAX_RESTARTS = 5
STABLE_S = 300.0
FIRST_DELAY_S = 1.0
MAX_DELAY_S = 30.0

_LATE_S = 0.4  # then one beat is overdue
_STEADY_BEATS = 3  # so many in time, one after the other, and a thread is taken for the one with the heartbeat
_SCAN_INTERVAL_S = 1.0  # for stubs that have just started
_SUM_INTERVAL_S = 2.0  # of tritonserver's hundreds of threads
_UNHEALTHY = re.compile(r"Stub process '(.+?)(?:_\d+)?_\d+(?:_gpu\d+)?' is not healthy")


@dataclass(frozen=True)
class Fault:
    """Why the server must be killed and started again.

    Attributes:
        stage: The model whose process it is; empty for tritonserver itself.
        reason: The rest of the sentence, e.g. `died (signal 9)`.
    """

    stage: str
    reason: str

    def __str__(self) -> str:
        return f"stage {self.stage} {self.reason}" if self.stage else f"{SERVER} {self.reason}"


def fault_in_answer(message: str) -> Fault | None:
    """Read from an error message of Triton that it has given a stage up; it doesn't say so in its log.

    Triton 2.51 answers the one request with that, and the next ones with wrong tensors.
    """
    match = _UNHEALTHY.search(message)
    return Fault(match[1], "was given up by Triton (its process is not healthy)") if match else None


class Watchdog:
    """Looks at tritonserver and its stubs whenever it is asked to; it is a context manager, which closes it.

    Stubs that start later are found within a second. Stop asking before the server is stopped on purpose, or a model
    unloaded: then its processes end.

    Args:
        server_pid: Tritonserver's process id.
        clock: Seconds, which go on while the machine is suspended.
    """

    def __init__(self, server_pid: int, clock: Callable[[], float] | None = None) -> None:
        self._clock = clock or _clock
        self._server_pid = server_pid
        self._server = _WatchedServer(server_pid)
        self._stubs: dict[int, _WatchedStub] = {}
        self._others: set[int] = set()  # processes that are no stubs, and needn't be looked at again
        self._checked_s = self._scanned_s = self._clock()
        self._find_stubs()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def stages(self) -> dict[str, int]:
        """Process id of each stage's stub, by the model's name."""
        return {process.stage: pid for pid, process in self._stubs.items()}

    def check(self) -> Fault | None:
        """Look at all processes once; call it every 100 ms.

        Returns:
            What is wrong, None if nothing is. Death is seen by the next call, a process that is stopped within 0.3 s,
            one that stands still for another reason within 0.9 s.
        """
        now = self._clock()
        gap, self._checked_s = now - self._checked_s, now
        if now - self._scanned_s >= _SCAN_INTERVAL_S:
            self._scanned_s = now
            self._find_stubs()
        processes: list[_WatchedProcess] = [self._server, *self._stubs.values()]
        return next((fault for process in processes if (fault := process.check(gap))), None)

    def close(self) -> None:
        """Close the files that are read."""
        self._server.close()
        while self._stubs:
            self._stubs.popitem()[1].close()

    def _find_stubs(self) -> None:
        present = set(process_ids())
        self._others &= present
        for pid in present - self._others - self._stubs.keys():
            if parent_of(pid) != self._server_pid:
                self._others.add(pid)
            elif (stub := stub_of(pid)) and stub.model and (process := _WatchedStub.find(stub)):
                self._stubs[pid] = process


class _Silence:
    """For how long a count hasn't risen.

    Only time counts in which the watchdog itself ran: where it didn't, the machine may have run nothing at all.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._count: int | None = None

    def update(self, count: int, seconds: float) -> int:
        """Take a count, and the time since the last one; returns by how much it has risen."""
        risen = count - self._count if self._count is not None else 0
        is_silent = risen == 0 and self._count is not None
        self.seconds = self.seconds + seconds if is_silent else 0.0
        self._count = count
        return risen


class _WatchedProcess(ABC):
    """What holds for tritonserver and its stubs alike: it dies, is stopped, or stands still."""

    def __init__(self, stage: str, pid: int, tid: int) -> None:
        self.stage, self._pid = stage, pid
        self._thread = Thread(pid, tid)
        self._stopped_s: float | None = None
        self._unseen_s = 0.0  # since it was last seen not to be stopped

    def close(self) -> None:
        self._thread.close()

    def check(self, gap: float) -> Fault | None:
        """Look at the process, `gap` seconds after the last time."""
        look = self._thread.look()
        self._unseen_s += gap
        if look.state in DEAD_STATES:
            number = ending_signal(self._pid)
            return Fault(self.stage, f"died (signal {number})" if number else "died")
        if look.state in STOPPED_STATES:
            self._stopped_s = 0.0 if self._stopped_s is None else self._stopped_s + gap
            return self._stalled(self._stopped_s, "stopped") if self._stopped_s >= STOPPED_S else None
        self._stopped_s = None
        unseen_s, self._unseen_s = self._unseen_s, 0.0
        return None if look.switches is None else self._check_silence(look.switches, unseen_s)

    @abstractmethod
    def _check_silence(self, switches: int, gap: float) -> Fault | None:
        """Say whether it stands still.

        Args:
            switches: How often the thread that is looked at has run.
            gap: Seconds since the last time.
        """

    def _stalled(self, seconds: float, why: str) -> Fault:
        return Fault(self.stage, f"has not run for {seconds:.1f} s ({why})")


class _WatchedServer(_WatchedProcess):
    """Tritonserver: none of its many threads has a beat that can be relied on, but together they have."""

    def __init__(self, pid: int) -> None:
        super().__init__("", pid, pid)
        self._silence = _Silence()
        self._unsummed_s = 0.0

    def _check_silence(self, switches: int, gap: float) -> Fault | None:
        self._unsummed_s += min(gap, MAX_STEP_S)
        if self._unsummed_s >= _SUM_INTERVAL_S:
            self._silence.update(switches_of_all_threads(self._pid) or switches, self._unsummed_s)
            self._unsummed_s = 0.0
        return self._stalled(self._silence.seconds, STALLED) if self._silence.seconds >= SERVER_SILENCE_S else None


class _WatchedStub(_WatchedProcess):
    """A stage: the thread with the heartbeat is looked at, and the others when it is late."""

    def __init__(self, stub: Stub, tid: int) -> None:
        super().__init__(stub.model, stub.pid, tid)
        self._beat, self._rest = _Silence(), _Silence()
        self._steady_beats = 0

    @classmethod
    def find(cls, stub: Stub) -> "_WatchedStub | None":
        """Return None where the stub is only starting, and its second thread isn't there yet."""
        try:
            return cls(stub, thread_ids(stub.pid)[1])
        except (IndexError, OSError):
            return None

    def _check_silence(self, switches: int, gap: float) -> Fault | None:
        seconds = min(gap, MAX_STEP_S)
        was_silent_s = self._beat.seconds
        beats = self._beat.update(switches, seconds)
        if gap > GAP_S and self._is_steady and beats * HEARTBEAT_S < ENOUGH_BEATS * gap:
            return self._stalled(gap, "the machine was paused, or far too busy")
        if beats:
            self._steady_beats += was_silent_s < _LATE_S
            self._rest = _Silence()
        elif self._is_steady and self._beat.seconds >= _LATE_S:
            return self._check_others(seconds)
        return None

    @property
    def _is_steady(self) -> bool:
        """Whether it is sure that the thread is the one with the heartbeat."""
        return self._steady_beats >= _STEADY_BEATS

    def _check_others(self, seconds: float) -> Fault | None:
        """Say whether all threads stand still: where others compute with all cores, a beat may come late."""
        others_ran = self._rest.update(switches_of_all_threads(self._pid) or 0, seconds)
        if others_ran or self._beat.seconds < SILENCE_S:
            return None
        return self._stalled(self._beat.seconds, STALLED)


def _clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def watch(watchdog: Watchdog, on_fault: Callable[[Fault], object]) -> Callable[[], None]:
    """Check in a thread of its own until there is a fault.

    Args:
        watchdog: It is closed at the end.
        on_fault: Called at most once, in that thread.

    Returns:
        A function that ends the watch, and returns when it has ended. `on_fault` isn't called any more afterwards.
    """
    ended = threading.Event()

    def run() -> None:
        with watchdog:
            while not ended.wait(CHECK_INTERVAL_S):
                if fault := watchdog.check():
                    if not ended.is_set():
                        on_fault(fault)
                    return

    thread = threading.Thread(target=run, name="watchdog", daemon=True)
    thread.start()

    def end() -> None:
        ended.set()
        if threading.current_thread() is not thread:
            thread.join()

    return end


class RestartPolicy:
    """Decides when a server that has failed is started again: at once, then later and later, and in the end not at all.

    A failure is forgotten when the server has been ready for a while since; the time that its starts take doesn't
    count, so that a large model that fails after each start is given up as well.

    Args:
        max_restarts: So many failures are followed by a start; the next one isn't.
        stable_s: A failure is forgotten after so many seconds in which the server was ready.
        clock: Seconds.
    """

    def __init__(
        self,
        max_restarts: int = MAX_RESTARTS,
        stable_s: float = STABLE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_restarts, self._stable_s, self._clock = max_restarts, stable_s, clock
        self._ready_since: float | None = None
        self._ready_s = 0.0  # in all, up to the last failure
        self._failures: list[float] = []  # at how many ready seconds

    def ready(self) -> None:
        """Note that the server is ready now."""
        self._ready_since = self._clock()

    def delay_s(self, fault: object) -> float:
        """Note a failure, and return how long to wait before the next start.

        Args:
            fault: What `str` makes a clause of.

        Raises:
            ServerError: It has failed too often.
        """
        if self._ready_since is not None:
            self._ready_s += self._clock() - self._ready_since
            self._ready_since = None
        fault = str(fault).removesuffix(".")
        recent = [failure for failure in self._failures if self._ready_s - failure < self._stable_s]
        self._failures = [*recent, self._ready_s]
        if len(recent) >= self._max_restarts:
            raise ServerError(
                f"{fault}; this is failure {len(recent) + 1} without {self._stable_s:g} s of readiness between, and "
                f"the server isn't started again."
            )
        return min(FIRST_DELAY_S * 2 ** (len(recent) - 1), MAX_DELAY_S) if recent else 0.0
