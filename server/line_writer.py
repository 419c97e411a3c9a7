"""Writes lines in a thread of its own: a reader who is slow, or doesn't read at all, holds up nobody else."""

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable

MAX_WAITING = 2000
CLOSE_TIMEOUT_S = 2.0


class LineWriter:
    """Writes to a file such as standard output, in the order of the calls.

    It goes past Python's own buffers: a thread that waits with one of those locked would end the program in a fatal
    error.

    Args:
        descriptor: Of the file. Where it is closed or broken, the lines go nowhere.
        describe_loss: Makes the line that stands in the place of so many lines, where too many waited.
    """

    def __init__(self, descriptor: int, describe_loss: Callable[[int], str]) -> None:
        self._descriptor, self._describe_loss = descriptor, describe_loss
        self._waiting: deque[str] = deque()
        self._lost = 0
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="line-writer", daemon=True)
        self._thread.start()

    def write(self, line: str, *, is_needed: bool = False) -> None:
        """Write a line soon.

        Args:
            line: Without its end.
            is_needed: It is written also where MAX_WAITING others wait already.
        """
        with self._changed:
            if len(self._waiting) >= MAX_WAITING and not is_needed:
                self._lost += 1
                return
            self._note_loss()
            self._waiting.append(line)
            self._changed.notify()

    def close(self) -> None:
        """Write what waits, if that doesn't take long."""
        with self._changed:
            self._note_loss()
            self._is_closing = True
            self._changed.notify()
        self._thread.join(CLOSE_TIMEOUT_S)

    def _note_loss(self) -> None:
        if self._lost:
            self._waiting.append(self._describe_loss(self._lost))
            self._lost = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if not self._waiting:
                    return
                lines = "".join(f"{line}\n" for line in self._waiting)
                self._waiting.clear()
            with contextlib.suppress(OSError):  # nobody reads it any more
                self._write(lines.encode())

    def _write(self, block: bytes) -> None:
        while block:
            block = block[os.write(self._descriptor, block) :]
