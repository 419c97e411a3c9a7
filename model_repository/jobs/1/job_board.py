"""Keeps how far each live request is and whether it was cancelled, for all Python models of a server.

Triton passes neither progress nor cancellation through an ensemble, and every Python model is a process of its own.
What all of them know is the request's id. The board is a folder in shared memory with a tiny file for each request,
named by a hash of its id: the stage that has the request writes how far it is, and the model `jobs` writes the byte
that cancels.

The stage that makes an entry draws a ticket, which goes through the ensemble with the request. A request without an id
has a file that is named by its ticket. So has one whose id a later request has taken over: the name was the id's, and
now is the later one's. The stages of the earlier one find it by the ticket, and nobody else can.

A cancellation may come before its request, which is still on its way. It leaves a *tombstone* for a few seconds: a file
beside the place of the entry, which cancels the request that comes with the id, once.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from job_entry import JobEntry, JobRecord, JobStatus, JobTimes, set_cancelled, set_dropped
from job_folder import folder_of, private_folder

MAX_ID_BYTES = 128

MAX_ENTRIES = 1024
"""4 MiB of shared memory: each takes a page."""
KEPT_ENTRIES = 768
"""Of too many, those that are over go first, and then those of which nothing was heard for the longest time."""
SWEEP_INTERVAL_S = 10.0
TICKET_BITS = 63

TOMBSTONE_TTL_S = 10.0
"""How long a request may take to come after its cancellation. An id that is used again later isn't hit."""
MAX_TOMBSTONES = 256
"""Of too many, the oldest go."""
_TOMBSTONE = ".cancelled"
STOP_FILE = "stop"
"""Whoever runs the server makes it."""
FULL_FILE = "full."
"""And the name of an ensemble: the tokenizer writes it, and whoever is before Triton may read it."""
_LEFT_AT = struct.Struct("<d")


class _HasRequestId(Protocol):
    """A Triton request."""

    def request_id(self) -> str: ...


class JobBoard:
    """The board of one model `jobs`. What can't be read or written is logged once, and raises nothing.

    Args:
        folder: Made if it doesn't exist, for this user alone.
        warn: Called with a sentence.
        clock: Seconds, the same for all processes.
    """

    def __init__(
        self, folder: Path, warn: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder, self._warn, self._clock = folder, warn, clock
        self._has_warned = False
        self._next_sweep_s = 0.0
        self._until_count = 0  # so many entries can be made before the board is listed again
        with self._warning_once(), private_folder(folder, make=True):
            pass

    @staticmethod
    def id_of(request: "_HasRequestId") -> str:
        """Return the id of a Triton request; an empty one if it isn't UTF-8, which Triton lets through over HTTP."""
        try:
            return str(request.request_id())
        except UnicodeDecodeError:
            return ""

    def create_entry(self, request_id: str, deadline_unix_us: int = 0) -> JobEntry:
        """Make the entry of a new request, `queued`; it is cancelled already if its cancellation came before it.

        Args:
            request_id: Where there is none, or one that `jobs` can't be asked for, only the stages find the entry.
            deadline_unix_us: When the client's time is up; 0 for never.
        """
        entry = JobEntry()
        with self._warning_once(), private_folder(self._folder, make=True) as folder:
            self._sweep_if_due(folder)
            entry = self._make_entry(folder, _file_name(request_id.encode()), deadline_unix_us)
        return entry  # noqa: RET504 - the block may have been left early

    def open_entry(self, request_id: str, ticket: int) -> JobEntry:
        """Open the entry that an earlier stage made; one that does nothing if there is none, or if it is over.

        What has ended as cancelled stays so for a stage to which it comes all the same.
        """
        was_cancelled = False
        if ticket > 0:
            for name in filter(None, (_file_name(request_id.encode()), _ticket_name(ticket))):
                with self._warning_once(), contextlib.suppress(FileNotFoundError):
                    file = self._open(name)
                    record = JobRecord.read(file)
                    if record and record.ticket == ticket and record.is_live:
                        return JobEntry(file, record, self._clock)
                    os.close(file)
                    was_cancelled |= bool(record and record.ticket == ticket and record.status.state == "cancelled")
        return JobEntry(was_cancelled=was_cancelled)

    def find_entry(self, request_id: str) -> JobEntry:
        """Open the entry of the live request that has an id, for those who get no ticket.

        It is one that does nothing if there is none, or where it can't be told which of two requests is meant.
        """
        if name := _file_name(request_id.encode()):
            with self._warning_once(), contextlib.suppress(FileNotFoundError):
                file = self._open(name)
                record = JobRecord.read(file)
                if record and record.is_live and not record.is_id_shared:
                    return JobEntry(file, record, self._clock)
                os.close(file)
        return JobEntry()

    def status(self, request_id: bytes) -> JobStatus:
        """Return how far a request is; `unknown` if there is no entry, or it finished a while ago."""
        return self._look_up(request_id)

    def cancel(self, request_id: bytes, *, is_dropped: bool = False) -> JobStatus:
        """Cancel a request if it is live; return how far it is now.

        Where it is unknown, the request that comes with this id within TOMBSTONE_TTL_S is cancelled.

        Args:
            request_id: The client's.
            is_dropped: Triton has ended it by itself.
        """

        def cancel(file: int) -> None:
            set_cancelled(file, True)
            if is_dropped:
                set_dropped(file)

        status = self._look_up(request_id, cancel)
        if status == JobStatus() and (name := _file_name(request_id)):
            with self._warning_once(), private_folder(self._folder, make=True) as folder:
                self._leave_tombstone(folder, name)
                # The request may have come meanwhile; where it comes after this look, it finds the tombstone.
                status = self._look_up(request_id, cancel)
                if status != JobStatus():
                    self._take_tombstone(folder, name)
        return status

    def sweep(self) -> None:
        """Remove what has expired."""
        with self._warning_once(), contextlib.suppress(FileNotFoundError), private_folder(self._folder) as folder:
            names = os.listdir(folder)  # noqa: PTH208 - of a descriptor
            self._sweep(folder, names)

    def is_stopping(self) -> bool:
        """Say whether requests that still run are to be answered now: a file tells so when the server stops."""
        return (self._folder / STOP_FILE).exists()

    def show_full(self, model: str, sentence: str) -> None:
        """Say, or say again, that there is no room for requests of an ensemble, or that there is.

        Args:
            model: The ensemble.
            sentence: What its callers may be told; an empty text where there is room. It holds for half a second, in
                which it is said again or not.
        """
        name = f"{FULL_FILE}{model}"
        with self._warning_once(), private_folder(self._folder) as folder:
            if not sentence:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)
                return
            file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
            with _closing(file):
                os.ftruncate(file, os.pwrite(file, sentence.encode(), 0))

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _look_up(self, request_id: bytes, cancel: Callable[[int], object] | None = None) -> JobStatus:
        if name := _file_name(request_id):
            with self._warning_once(), contextlib.suppress(FileNotFoundError), _closing(self._open(name)) as file:
                record = JobRecord.read(file)
                if record and not record.is_expired(self._clock()):
                    if cancel and record.is_live:
                        cancel(file)
                    return record.status
        return JobStatus()

    def _open(self, name: str) -> int:
        with private_folder(self._folder) as folder:
            return _open(folder, name)

    def _make_entry(self, folder: int, name: str, deadline_unix_us: int) -> JobEntry:
        """Write a file under a name of its own, and rename it: an incomplete one is never seen."""
        ticket, now = 1 + secrets.randbelow(2**TICKET_BITS - 1), self._clock()
        is_cancelled = bool(name) and self._take_tombstone(folder, name)
        is_shared = bool(name) and _make_room(folder, name)
        status, times = JobStatus("queued"), JobTimes(arrived_s=now)
        record = JobRecord(ticket, now, status, times, deadline_unix_us, is_shared)
        draft = f"{_ticket_name(ticket)}.draft"
        with _new_file(folder, draft) as file:
            record.write(file)
            set_cancelled(file, is_cancelled)
            os.rename(draft, name or _ticket_name(ticket), src_dir_fd=folder, dst_dir_fd=folder)
            if name and self._take_tombstone(folder, name):  # left since the first look
                set_cancelled(file, True)
        return JobEntry(file, record, self._clock)

    def _leave_tombstone(self, folder: int, name: str) -> None:
        tombstones = [other for other in os.listdir(folder) if other.endswith(_TOMBSTONE)]
        if len(tombstones) >= MAX_TOMBSTONES:
            self._sweep_tombstones(folder, tombstones)
        draft = f"{name}.{secrets.token_hex(8)}"
        with _new_file(folder, draft) as file:
            os.pwrite(file, _LEFT_AT.pack(self._clock()), 0)
            os.rename(draft, f"{name}{_TOMBSTONE}", src_dir_fd=folder, dst_dir_fd=folder)
        os.close(file)

    def _take_tombstone(self, folder: int, name: str) -> bool:
        """Remove the tombstone of an id; return whether there was one that still counts."""
        left_s = _left_at(folder, f"{name}{_TOMBSTONE}")
        if left_s is None:
            return False
        _remove(folder, f"{name}{_TOMBSTONE}")
        return self._clock() < left_s + TOMBSTONE_TTL_S

    def _sweep_tombstones(self, folder: int, names: list[str]) -> None:
        """Remove tombstones that no longer count, and the oldest if there are as many as there may be."""
        found = sorted((_left_at(folder, name) or 0.0, name) for name in names)
        too_many = len(names) - MAX_TOMBSTONES + 1
        for number, (left_s, name) in enumerate(found):
            if number < too_many or self._clock() >= left_s + TOMBSTONE_TTL_S:
                _remove(folder, name)

    def _sweep_if_due(self, folder: int) -> None:
        """Sweep after a while, or if there are too many entries: a full board isn't listed for each new one."""
        is_time = self._clock() >= self._next_sweep_s
        self._until_count -= 1
        if self._until_count > 0 and not is_time:
            return
        names = os.listdir(folder)
        self._until_count = (MAX_ENTRIES - len(names)) // 2  # the other half is for another process
        if is_time or len(names) >= MAX_ENTRIES:
            self._next_sweep_s = self._clock() + SWEEP_INTERVAL_S
            self._sweep(folder, names)

    def _sweep(self, folder: int, names: list[str]) -> None:
        """Remove the entries that have expired, and those that are too many."""
        kept = []
        self._sweep_tombstones(folder, [name for name in names if name.endswith(_TOMBSTONE)])
        for name in names:
            if name.endswith(_TOMBSTONE):
                continue
            with contextlib.suppress(FileNotFoundError), _closing(_open(folder, name)) as file:
                record = JobRecord.read(file)
                if record and not record.is_expired(self._clock()):
                    kept.append((record.is_live, record.written_s, name))
                elif record:
                    _remove(folder, name)
        if len(kept) >= MAX_ENTRIES:
            for _, _, name in sorted(kept)[:-KEPT_ENTRIES]:
                _remove(folder, name)

    @contextlib.contextmanager
    def _warning_once(self) -> Iterator[None]:
        """Tell of what the operating system refuses, the first time, and go on after the block."""
        try:
            yield
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                self._warn(
                    f"The job board at {self._folder} can't be used ({error}): requests run, and can't be watched or "
                    f"cancelled by their ids, or counted. Is there room in {self._folder.parent}? This is said once."
                )


def open_board(model: str, warn: Callable[[str], object]) -> JobBoard:
    """Return the board of the model `model` of this server: all of its Python models are its child processes."""
    return JobBoard(folder_of(model, os.getppid()), warn)


def _file_name(request_id: bytes) -> str:
    """Return a name which says nothing of the id; an empty one where `jobs` can't be asked for such an id."""
    return hashlib.sha256(request_id).hexdigest() if 1 <= len(request_id) <= MAX_ID_BYTES else ""


def _ticket_name(ticket: int) -> str:
    return f"{ticket:016x}"


def _make_room(folder: int, name: str) -> bool:
    """Put the entry of a live request aside under the name of its ticket; return whether there was one."""
    with contextlib.suppress(FileNotFoundError), _closing(_open(folder, name)) as file:
        record = JobRecord.read(file)
        if record and record.is_live:
            os.rename(name, _ticket_name(record.ticket), src_dir_fd=folder, dst_dir_fd=folder)
            return True
    return False


def _left_at(folder: int, name: str) -> float | None:
    """Return when a tombstone was left; None if there is none."""
    with contextlib.suppress(FileNotFoundError, struct.error), _closing(_open(folder, name)) as file:
        [left_s] = _LEFT_AT.unpack(os.pread(file, _LEFT_AT.size, 0))
        return float(left_s)
    return None


def _remove(folder: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=folder)


@contextlib.contextmanager
def _new_file(folder: int, name: str) -> Iterator[int]:
    """Make a file that didn't exist; it stays open, and where the block fails, it goes."""
    file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        yield file
    except BaseException:
        os.close(file)
        os.unlink(name, dir_fd=folder)
        raise


def _open(folder: int, name: str) -> int:
    return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


@contextlib.contextmanager
def _closing(file: int) -> Iterator[int]:
    try:
        yield file
    finally:
        os.close(file)
