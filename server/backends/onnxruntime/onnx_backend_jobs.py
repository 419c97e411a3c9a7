"""What the server's job boards say of a request that has waited for an ONNX model: whether anybody still wants it.

A board is that of an ensemble (`model_repository/jobs/1/job_board.py`). A server whose models have none has none here.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

# What the Python models share isn't copied: this backend lies beside the repository that it was made for.
sys.path.append(str(Path(__file__).resolve().parents[3] / "model_repository" / "jobs" / "1"))

from job_board import JobBoard
from job_folder import folders_of


class GivenUpError(Exception):
    """Nobody waits for a request any more. The text is the contract's.

    Attributes:
        reason: `CANCELLED` or `DEADLINE`, with which the text starts.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(f"[{reason}] {sentence}")
        self.reason = reason


class JobBoards:
    """The boards of one server, as a model sees them that gets a request's id and nothing else.

    Args:
        model: The model's name, for sentences.
        server_pid: The server's process id.
        warn: Called with a sentence.
    """

    def __init__(self, model: str, server_pid: int, warn: Callable[[str], object]) -> None:
        self._model, self._server_pid, self._warn = model, server_pid, warn
        self._boards: list[JobBoard] = []

    def given_up(self, request_id: str) -> GivenUpError | None:
        """Return why nobody waits for a request any more, and end it on its board; None if somebody does."""
        for board in self._found():
            entry = board.find_entry(request_id)
            deadline_unix_us = entry.record.deadline_unix_us
            if entry.is_cancelled():
                entry.end("cancelled")
                return GivenUpError("CANCELLED", f"the request was cancelled before it came to {self._model}.")
            if deadline_unix_us and time.time_ns() // 1000 >= deadline_unix_us:
                entry.end("failed", "DEADLINE")
                return GivenUpError("DEADLINE", f"the time was up before the request came to {self._model}.")
            entry.close()
        return None

    def end_failed(self, request_id: str, reason: str) -> None:
        """Write that a request has failed here, for no later stage will."""
        for board in self._found():
            board.find_entry(request_id).end("failed", reason)

    def _found(self) -> list[JobBoard]:
        """Return the boards. The models that make them may load after this one, and not after the first request."""
        if not self._boards:
            self._boards = [JobBoard(folder, self._warn) for folder in folders_of(self._server_pid)]
        return self._boards
