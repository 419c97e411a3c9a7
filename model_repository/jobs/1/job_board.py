"""Keeps how far each live request is and whether it was cancelled, for all Python models of a server.

Triton passes neither progress nor cancellation through an ensemble, and every Python model is a process of its own.
What all of them know is the request's id. The board is a folder in shared memory with a tiny file for each request,
named by a hash of its id: the stage that has the request writes how far it is, and the model `jobs` writes the byte
that cancels.

The stage that makes an entry draws a ticket, which goes through the ensemble with the request. A later request with
the same id gets a file of its own; the stages of the earlier one then neither write to it nor are cancelled by it.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from job_entry import JobEntry, JobRecord, JobStatus, set_cancelled
from job_folder import folder_of, private_folder

MAX_ID_BYTES = 128

MAX_ENTRIES = 1024
"""4 MiB of shared memory: each takes a page."""
KEPT_ENTRIES = 768
"""Of too many, those that are over go first, and then those of which nothing was heard for the longest time."""
SWEEP_INTERVAL_S = 10.0
TICKET_BITS = 63


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
        with self._warning_once(), private_folder(folder, make=True):
            pass

    @staticmethod
    def id_of(request: "_HasRequestId") -> str:
        """Return the id of a Triton request; an empty one if it isn't UTF-8, which Triton lets through over HTTP."""
        try:
            return str(request.request_id())
        except UnicodeDecodeError:
            return ""

    def create_entry(self, request_id: str) -> JobEntry:
        """Make the entry of a new request, `queued`, in place of one with the same id.

        Args:
            request_id: Where there is none, or one that `jobs` can't be asked for, the entry does nothing.
        """
        if name := _file_name(request_id.encode()):
            with self._warning_once(), private_folder(self._folder, make=True) as folder:
                self._sweep_if_due(folder)
                return self._make_entry(folder, name)
        return JobEntry()

    def open_entry(self, request_id: str, ticket: int) -> JobEntry:
        """Open the entry that an earlier stage made; one that does nothing if the id is another request's by now."""
        if ticket and (name := _file_name(request_id.encode())):
            with self._warning_once(), contextlib.suppress(FileNotFoundError):
                file = self._open(name)
                record = JobRecord.read(file)
                if record and record.ticket == ticket:
                    return JobEntry(file, record, self._clock)
                os.close(file)
        return JobEntry()

    def status(self, request_id: bytes) -> JobStatus:
        """Return how far a request is; `unknown` if there is no entry, or it finished a while ago."""
        return self._look_up(request_id, cancel=False)

    def cancel(self, request_id: bytes) -> JobStatus:
        """Cancel a request if it is live; return how far it is now."""
        return self._look_up(request_id, cancel=True)

    def remove(self) -> None:
        """Remove the folder with all that is in it."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _look_up(self, request_id: bytes, *, cancel: bool) -> JobStatus:
        if name := _file_name(request_id):
            with self._warning_once(), contextlib.suppress(FileNotFoundError), _closing(self._open(name)) as file:
                record = JobRecord.read(file)
                if record and not record.is_expired(self._clock()):
                    if cancel and record.is_live:
                        set_cancelled(file, True)
                    return record.status
        return JobStatus()

    def _open(self, name: str) -> int:
        with private_folder(self._folder) as folder:
            return _open(folder, name)

    def _make_entry(self, folder: int, name: str) -> JobEntry:
        """Write a file under a name of its own, and rename it: an incomplete one is never seen."""
        draft = f"{name}.{secrets.token_hex(8)}"
        record = JobRecord(1 + secrets.randbelow(2**TICKET_BITS - 1), self._clock(), JobStatus("queued"))
        file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            record.write(file)
            set_cancelled(file, False)
            os.rename(draft, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.close(file)
            os.unlink(draft, dir_fd=folder)
            raise
        return JobEntry(file, record, self._clock)

    def _sweep_if_due(self, folder: int) -> None:
        names = os.listdir(folder)
        if len(names) >= MAX_ENTRIES or self._clock() >= self._next_sweep_s:
            self._next_sweep_s = self._clock() + SWEEP_INTERVAL_S
            self._sweep(folder, names)

    def _sweep(self, folder: int, names: list[str]) -> None:
        """Remove the entries that have expired, and those that are too many."""
        kept = []
        for name in names:
            with contextlib.suppress(FileNotFoundError), _closing(_open(folder, name)) as file:
                record = JobRecord.read(file)
                if record and not record.is_expired(self._clock()):
                    kept.append((record.is_live, record.written_s, name))
                elif record:
                    os.unlink(name, dir_fd=folder)
        if len(kept) >= MAX_ENTRIES:
            for _, _, name in sorted(kept)[:-KEPT_ENTRIES]:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)

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
                    f"cancelled by their ids. Is there room in {self._folder.parent}? This is said once."
                )


def open_board(model: str, warn: Callable[[str], object]) -> JobBoard:
    """Return the board of the model `model` of this server: all of its Python models are its child processes."""
    return JobBoard(folder_of(model, os.getppid()), warn)


def _file_name(request_id: bytes) -> str:
    """Return a name which says nothing of the id; an empty one where `jobs` can't be asked for such an id."""
    return hashlib.sha256(request_id).hexdigest() if 1 <= len(request_id) <= MAX_ID_BYTES else ""


def _open(folder: int, name: str) -> int:
    return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)


@contextlib.contextmanager
def _closing(file: int) -> Iterator[int]:
    try:
        yield file
    finally:
        os.close(file)
