"""What `close_on_signals` of the clients does. A library installs no signal handlers unless it is asked to."""

import asyncio
import contextlib
import queue
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from types import FrameType

ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM)

JOIN_TIMEOUT_S = 3.0
"""How long the end of a block waits for its thread: somewhat more than telling silent servers takes."""

Handler = Callable[[int, FrameType | None], object]


@contextlib.contextmanager
def close_on_signals(close: Callable[[], object], signals: Sequence[signal.Signals]) -> Iterator[None]:
    """See `AudioLDM2Client.close_on_signals`.

    A handler runs between any two instructions of the main thread, which may hold a lock: the thread that closes is
    started before, and woken through a queue, which is all that a handler may use.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()

    def work() -> None:
        if wanted.get():
            close()

    def end(number: int) -> None:
        raise SystemExit(128 + number)

    closing = threading.Thread(target=work, name="audioldm2-signals", daemon=True)
    with _handlers(signals, lambda: wanted.put(True), end):
        closing.start()
        try:
            yield
        finally:
            wanted.put(False)
            closing.join(JOIN_TIMEOUT_S)


@contextlib.asynccontextmanager
async def close_on_signals_async(
    close: Callable[[], Awaitable[object]], signals: Sequence[signal.Signals]
) -> AsyncIterator[None]:
    """See `AsyncAudioLDM2Client.close_on_signals`."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    closing: list[asyncio.Future[object]] = []
    ended_by: list[int] = []

    def end(number: int) -> None:
        ended_by.append(number)
        if task is not None:
            loop.call_soon_threadsafe(task.cancel)

    with _handlers(
        signals, lambda: loop.call_soon_threadsafe(lambda: closing.append(asyncio.ensure_future(close()))), end
    ):
        try:
            yield
        finally:
            await asyncio.gather(*closing)
            if ended_by:
                raise SystemExit(128 + ended_by[0])


@contextlib.contextmanager
def _handlers(
    signals: Sequence[signal.Signals], act: Callable[[], object], end: Callable[[int], object]
) -> Iterator[None]:
    """Let signals call `act`, and then what they called before: `end` where that was the system's own way."""
    before = {number: signal.getsignal(number) for number in signals}

    def handle(number: int, frame: FrameType | None) -> None:
        act()
        previous = before[signal.Signals(number)]
        if callable(previous):
            previous(number, frame)
        else:
            end(number)

    # What is ignored, as under nohup, stays ignored; None is a handler that Python knows nothing of.
    installed = [number for number in signals if before[number] not in (signal.SIG_IGN, None)]
    for number in installed:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number in installed:
            if signal.getsignal(number) is handle:  # else somebody has installed another one since
                signal.signal(number, before[number])
