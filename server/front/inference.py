"""What is looked at in an inference before Triton sees it, for both protocols."""

import math
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from server.front.refusals import INVALID, RefusedError

IdChoice = Callable[[str, str], str]
"""Returns the id of a request for a model (the first text), which may have an id already (the second)."""

MAX_RANK = 8
ID_BYTES = 16
SHARED_MEMORY = "shared_memory_"
"""How the parameters begin with which a tensor says that it lies in shared memory."""


@dataclass(frozen=True)
class Inference:
    """An inference that was let through.

    Attributes:
        model: Its name.
        request_id: The caller's, or one that was drawn here.
        timeout_s: Until the caller's time is up; None for never.
        body: What Triton gets: written anew from what was read, so that both read the same.
        json_length: Bytes of an HTTP body that are JSON, where tensors follow it; None where none do.
    """

    model: str
    request_id: str
    timeout_s: float | None
    body: bytes
    json_length: int | None = None


def new_id() -> str:
    """Draw an id that nobody guesses."""
    return secrets.token_hex(ID_BYTES)


def check_shape(name: str, shape: Sequence[object], message_bytes: int) -> None:
    """Refuse a tensor that says that it has more elements than its message has bytes.

    Triton takes memory for what the shape says, and counts its bytes with numbers that overflow.

    Args:
        name: Of the tensor.
        shape: As it came.
        message_bytes: Of the whole message: no element takes less than one.

    Raises:
        RefusedError: It does; or its shape isn't one.
    """
    sizes = [size for size in shape if isinstance(size, int) and not isinstance(size, bool) and size >= 0]
    if len(sizes) != len(shape):
        raise RefusedError(INVALID, f"input {name[:40]!r}: the sizes of a shape must be whole numbers of at least 0.")
    if len(sizes) > MAX_RANK:
        raise RefusedError(
            INVALID, f"input {name[:40]!r}: a shape must have at most {MAX_RANK} sizes, got {len(sizes)}."
        )
    if (elements := math.prod(max(size, 1) for size in sizes)) > message_bytes:
        raise RefusedError(
            INVALID,
            f"input {name[:40]!r}: its shape has {elements:.3g} elements, and the message {message_bytes} bytes.",
        )


def check_parameters(name: str, parameters: Iterable[str]) -> None:
    """Refuse a tensor in shared memory.

    Raises:
        RefusedError: It says that it lies there.
    """
    if any(parameter.startswith(SHARED_MEMORY) for parameter in parameters):
        raise RefusedError(
            INVALID, f"input {name[:40]!r}: tensors in shared memory aren't offered; send it in the message."
        )


def seconds(timeout_us: object) -> float | None:
    """Return the request parameter `timeout` in seconds; None where it isn't a positive whole number."""
    return timeout_us / 1e6 if isinstance(timeout_us, int) and timeout_us > 0 else None
