"""How signals end the commands: the first one cancels what runs and leaves nothing half done, a second ends at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

_ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _interrupt() -> None:
    raise KeyboardInterrupt


class CommandSignals:
    """Handle SIGINT, SIGTERM and SIGHUP while the block runs; what is ignored, as under nohup, stays ignored.

    Attributes:
        received: the first signal, None as long as there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, signal.Handlers | Callable[[int, FrameType | None], object] | int] = {}
        self._action: Callable[[], object] = _interrupt

    def __enter__(self) -> "CommandSignals":
        if threading.current_thread() is threading.main_thread():  # Python lets no other set handlers
            for number in _ENDING:
                before = signal.getsignal(number)
                if before is not None and before != signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    @contextlib.contextmanager
    def calling(self, action: Callable[[], object]) -> Iterator[None]:
        """Let the first signal call `action`, in the main thread, instead of raising KeyboardInterrupt there."""
        self._action = action
        try:
            yield
        finally:
            self._action = _interrupt

    @property
    def status(self) -> int:
        """The exit status after a signal."""
        return 128 + (signal.SIGINT if self.received is None else self.received)

    @property
    def words(self) -> str:
        """What has ended the command."""
        interrupted = self.received in (None, signal.SIGINT)
        return "interrupted" if interrupted else f"ended by {signal.Signals(self.status - 128).name}"

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        # The kernel keeps the default actions from the first process of a container.
        at_once = signal.SIG_DFL if os.getpid() != 1 else lambda second, _: os._exit(128 + second)
        for other in self._before:
            signal.signal(other, at_once)
        self._action()
