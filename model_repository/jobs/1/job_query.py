"""What is asked of the model `jobs`, and the sentence for what is wrong."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from job_board import MAX_ID_BYTES

ACTIONS = ("status", "cancel")
SHOWN_BYTES = 40
DROPPED = "dropped_by_triton"
"""Parameter of a cancellation: Triton has ended the request by itself. The front says it, and lets nobody else."""


class InvalidQueryError(ValueError):
    """An input has a value that it can't have. The text is the contract's `[INVALID_ARG] <input name> ...`."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"[INVALID_ARG] {name} {problem}")


@dataclass(frozen=True)
class JobQuery:
    """A checked question.

    Attributes:
        request_id: Of the generation, UTF-8, 1 to MAX_ID_BYTES bytes.
        action: One of ACTIONS.
        is_dropped: Whether Triton has ended it by itself.
    """

    request_id: bytes
    action: str = ACTIONS[0]
    is_dropped: bool = False


def parse_query(inputs: Mapping[str, np.ndarray], parameters: str = "{}") -> JobQuery:
    """Turn the inputs of a Triton request, BYTES [1] each and `action` optional, into a checked JobQuery.

    Args:
        inputs: By name.
        parameters: Of the request, JSON.

    Raises:
        InvalidQueryError: An input is out of bounds.
    """
    request_id = _encoded(inputs["request_id"])
    if not 1 <= len(request_id) <= MAX_ID_BYTES:
        raise InvalidQueryError(
            "request_id", f"is out of bounds: it must have between 1 and {MAX_ID_BYTES} bytes, got {len(request_id)}."
        )
    try:
        request_id.decode()
    except UnicodeDecodeError as error:
        raise InvalidQueryError("request_id", f"must be UTF-8, and byte {error.start} of it isn't.") from None
    if "action" not in inputs:
        return JobQuery(request_id)
    action = _encoded(inputs["action"])
    if action not in [known.encode() for known in ACTIONS]:
        got = action[:SHOWN_BYTES].decode(errors="replace")
        raise InvalidQueryError("action", f"must be one of {', '.join(ACTIONS)}, got {got!r}.")
    return JobQuery(request_id, action.decode(), json.loads(parameters).get(DROPPED) is True)


def _encoded(tensor: np.ndarray) -> bytes:
    value = tensor[0]
    return value.encode() if isinstance(value, str) else bytes(value)
