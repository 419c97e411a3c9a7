"""How one thread ends what another one waits for: the local half of a cancellation."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Dropped(Exception):  # noqa: N818 - an order, not an error
    """The call was dropped."""


class Drop:
    """One call's switch. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._forbidden = threading.Event()
        self._action: Callable[[], object] | None = None

    @property
    def requested(self) -> bool:
        """Whether the call shall end."""
        return self._event.is_set()

    def forbid(self) -> None:
        """Let nothing more begin; what has begun goes on."""
        with self._lock:
            self._forbidden.set()

    def begin(self, note: Callable[[], object]) -> None:
        """Call `note`, before something is sent: whoever calls `forbid` sees what was noted, or it isn't sent.

        Raises:
            Dropped: `forbid` was called before.
        """
        with self._lock:
            if self._forbidden.is_set():
                raise Dropped
            note()

    def request(self) -> None:
        """End the call, now or as soon as it begins to wait."""
        with self._lock:
            self._forbidden.set()
            self._event.set()
            if self._action is not None:
                self._action()
                self._action = None

    @contextmanager
    def ends(self, action: Callable[[], object]) -> Iterator[None]:
        """While inside, `request` calls `action`, in its own thread; once at most, and at once if it was called before.

        Raises:
            Dropped: `request` was called before.
        """
        with self._lock:
            if self.requested:
                raise Dropped
            self._action = action
        try:
            yield
        finally:
            with self._lock:
                self._action = None

    def sleep(self, seconds: float) -> None:
        """Wait.

        Raises:
            Dropped: `forbid` or `request` was called, before or meanwhile.
        """
        if self._forbidden.wait(seconds):
            raise Dropped
