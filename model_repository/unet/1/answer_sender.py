"""Keeps a question about a request from meeting its answer on the way to Triton."""

import threading
from collections.abc import Callable


class AnswerSender:
    """Sends a request's one answer, and asks whether it was cancelled, never both at once and never the latter after.

    Triton's Python backend frees what `is_cancelled` asks for as soon as the answer has come: a question that is on its
    way then ends tritonserver (signal 11 in `TRITONBACKEND_ResponseFactoryIsCancelled`, seen with 24.10).

    Args:
        ask: Asks Triton whether the client has given up; a round trip between processes.
    """

    def __init__(self, ask: Callable[[], bool]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._is_answered = False

    def is_cancelled(self) -> bool:
        """Return whether the client has given up; False, without asking, once the answer is sent."""
        with self._lock:
            return not self._is_answered and self._ask()

    def send(self, send: Callable[[], object]) -> None:
        """Call `send`, which sends the answer, while nobody asks."""
        with self._lock:
            self._is_answered = True
            send()
