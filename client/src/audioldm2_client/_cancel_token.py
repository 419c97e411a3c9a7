"""A token by which one thread cancels what another one waits for: the local half of a cancellation."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class CallCancelledError(Exception):
    """The call's token was cancelled."""


class CancelToken:
    """The cancel token of one call with all its attempts. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._refuses_attempts = threading.Event()
        self._action: Callable[[], object] | None = None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()

    @property
    def refuses_attempts(self) -> bool:
        """Whether the call is about to end: `refuse_attempts` or `cancel` was called."""
        return self._refuses_attempts.is_set()

    def refuse_attempts(self) -> None:
        """Let no further attempt begin; one that has begun continues."""
        with self._lock:
            self._refuses_attempts.set()

    def begin_attempt(self, note: Callable[[], object]) -> None:
        """Call `note` before something is sent. After `refuse_attempts`, all that is sent has been noted.

        Raises:
            CallCancelledError: `refuse_attempts` was called before; nothing must be sent.
        """
        with self._lock:
            if self.refuses_attempts:
                raise CallCancelledError
            note()

    def cancel(self) -> None:
        """End the call, now or as soon as it begins to wait."""
        with self._lock:
            self._refuses_attempts.set()
            self._event.set()
            if self._action is not None:
                self._action()
                self._action = None

    @contextmanager
    def on_cancel(self, action: Callable[[], object]) -> Iterator[None]:
        """Let `cancel` call `action` while the block runs, in the thread that cancels, and at most once.

        Raises:
            CallCancelledError: `cancel` was called before the block.
        """
        with self._lock:
            if self.cancelled:
                raise CallCancelledError
            self._action = action
        try:
            yield
        finally:
            with self._lock:
                self._action = None

    def sleep(self, seconds: float) -> None:
        """Wait.

        Raises:
            CallCancelledError: `refuse_attempts` or `cancel` was called, before or while it waits.
        """
        if self._refuses_attempts.wait(seconds):
            raise CallCancelledError
