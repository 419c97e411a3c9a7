"""Tell servers to stop what nobody waits for any more, where the caller's own threads can't.

A garbage collector, an event loop that ends and a deadline that has passed leave no time for I/O, and the first two may
not wait for a lock either. They put what is to be done into a queue (`SimpleQueue.put` is reentrant), and threads of
this module do it. The end of the process waits for them, a little.
"""

import atexit
import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable

from audioldm2_client._exceptions import AudioLDM2Error

EXIT_WAIT_S = 3.0
"""How long the end of the process waits: somewhat more than telling takes where the server doesn't answer."""


class Abandoned:
    """Run actions in threads of their own. `start` was called before the first `put`."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        """Begin anew; also in a forked child, which has none of its parent's threads."""
        self._queue: queue.SimpleQueue[Callable[[], object] | threading.Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._runs = False

    def start(self) -> None:
        """Start the thread that takes actions from the queue, unless it runs."""
        with self._lock:
            if not self._runs:
                threading.Thread(
                    target=self._work, args=(self._queue,), name="audioldm2-abandoned", daemon=True
                ).start()
                self._runs = True

    def put(self, action: Callable[[], object]) -> None:
        """Have an action run soon. Takes no lock: safe in a finalizer, a signal handler and an event loop."""
        self._queue.put(action)

    def finish(self, timeout_s: float = EXIT_WAIT_S) -> None:
        """Wait until everything that was put before is done, at most so long."""
        if self._runs:
            reached = threading.Event()
            self._queue.put(reached)
            reached.wait(timeout_s)

    @staticmethod
    def _work(actions: "queue.SimpleQueue[Callable[[], object] | threading.Event]") -> None:
        running: list[threading.Thread] = []
        while True:
            item = actions.get()
            running = [thread for thread in running if thread.is_alive()]
            if isinstance(item, threading.Event):
                _join(running, EXIT_WAIT_S)
                item.set()
            else:
                running.append(threading.Thread(target=_run, args=(item,), daemon=True))
                running[-1].start()


def _run(action: Callable[[], object]) -> None:
    with contextlib.suppress(AudioLDM2Error, OSError, RuntimeError):  # RuntimeError: the client is closed
        action()


def run_together(actions: list[Callable[[], object]]) -> None:
    """Run actions at the same time and wait for all. Plain threads: executors refuse work while Python ends."""
    if len(actions) == 1:
        actions[0]()
        return
    threads = [threading.Thread(target=action, daemon=True) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _join(threads: list[threading.Thread], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))


abandoned = Abandoned()
"""Of this process."""

atexit.register(abandoned.finish)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=abandoned._reset)
