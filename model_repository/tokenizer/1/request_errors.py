"""Why a request gets no further than the first stage.

RequestError
├── InvalidInputError      an input has a value that it can't have
├── ServerBusyError        there is no room for it now
├── RequestCancelledError  its cancellation came before it
└── DeadlineError          the client's time is up
"""

from typing import ClassVar


class RequestError(Exception):
    """A request is refused. The text is what the client reads.

    Attributes:
        reason: The contract's tag, with which the text starts.
        code: The name of Triton's error code.
    """

    reason: ClassVar[str]
    code: ClassVar[str]

    def __init__(self, sentence: str) -> None:
        super().__init__(f"[{self.reason}] {sentence}")


class InvalidInputError(RequestError, ValueError):
    """An input has a value that it can't have. The text is the contract's `[INVALID_ARG] <input name> ...`."""

    reason = code = "INVALID_ARG"

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")


class ServerBusyError(RequestError):
    """There is no room for it now."""

    reason = code = "UNAVAILABLE"


class RequestCancelledError(RequestError):
    """Its cancellation came before it."""

    reason = code = "CANCELLED"


class DeadlineError(RequestError):
    """The client's time is up."""

    reason = "DEADLINE"
    code = "CANCELLED"
