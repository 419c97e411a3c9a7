"""What is looked at in an inference before Triton sees it, for both protocols."""

import math
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from server.front.refusals import INVALID, RefusedError

IdChoice = Callable[[str, str], str]
"""Returns the id of a request for a model (the first text), which may have an id already (the second)."""

MAX_RANK = 8
MAX_PARAMETERS = 64
"""Of a request or a tensor. Triton compares each with all others, at each stage: 30,000 took it 17 s."""
MAX_TIMEOUT_US = 2**63 - 1
LONGEST_TIMEOUT_S = 86400.0
"""Of timeouts that the front keeps. It ends what says nothing for so long anyway (server/front/envoy.yaml)."""
MAX_ID_BYTES = 1024
"""Errors carry the id, and over gRPC they must fit into a header."""
ID_BYTES = 16
DROPPED = "dropped_by_triton"
"""Parameter with which the front alone says that Triton has ended a request (model_repository/jobs/1/job_query.py)."""
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


def check_id(request_id: str) -> None:
    """Refuse an id that can't be sent back.

    Raises:
        RefusedError: It is too long, or no Unicode.
    """
    try:
        size = len(request_id.encode())
    except UnicodeEncodeError:
        raise RefusedError(INVALID, "id must be Unicode text, and has half of a surrogate pair.") from None
    if size > MAX_ID_BYTES:
        raise RefusedError(INVALID, f"id must have at most {MAX_ID_BYTES} bytes, got {size}.")


def check_timeout(timeout_us: object) -> None:
    """Refuse a `timeout` that isn't a number of microseconds; None, for no timeout, is let through.

    Raises:
        RefusedError: It isn't.
    """
    is_whole = isinstance(timeout_us, int) and not isinstance(timeout_us, bool)
    if timeout_us is not None and not (is_whole and 0 <= timeout_us <= MAX_TIMEOUT_US):  # type: ignore[operator]
        shown = ascii(timeout_us) if not is_whole or abs(timeout_us) < 2**64 else "more"  # type: ignore[arg-type]
        raise RefusedError(
            INVALID, f"timeout must be a whole number of microseconds, 0 to {MAX_TIMEOUT_US}, got {shown[:40]}."
        )


def check_shapes(shapes: Iterable[tuple[str, Sequence[object]]], message_bytes: int) -> None:
    """Refuse tensors that are one by one, or together, larger than their message.

    Args:
        shapes: Name and shape of each.
        message_bytes: Of the whole message.

    Raises:
        RefusedError: They are; or a shape isn't one.
    """
    total = 0
    for name, shape in shapes:
        total += check_shape(name, shape, message_bytes)
        if total > message_bytes:
            raise RefusedError(
                INVALID,
                f"the shapes up to {name[:40]!r} have {total:.3g} elements, and the message {message_bytes} bytes.",
            )


def check_shape(name: str, shape: Sequence[object], message_bytes: int) -> int:
    """Refuse a tensor that says that it has more elements than its message has bytes.

    Triton takes memory for what the shape says, and counts its bytes with numbers that overflow.

    Args:
        name: Of the tensor.
        shape: As it came.
        message_bytes: Of the whole message: no element takes less than one.

    Returns:
        How many elements it has, an empty dimension counted as one.

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
        shown = f"{elements:.3g}" if elements < 10**300 else "more than 1e+300"
        raise RefusedError(
            INVALID, f"input {name[:40]!r}: its shape has {shown} elements, and the message {message_bytes} bytes."
        )
    return elements


def check_number(what: str, number: int, most: int = MAX_PARAMETERS) -> None:
    """Refuse more of something than are of use.

    Raises:
        RefusedError: There are.
    """
    if number > most:
        raise RefusedError(INVALID, f"there may be at most {most} {what}, got {number}.")


def check_parameters(name: str, parameters: Collection[str]) -> None:
    """Refuse a tensor in shared memory, and one with many parameters.

    Raises:
        RefusedError: It says that it lies there, or has them.
    """
    check_number(f"parameters of the tensor {name[:40]!r}", len(parameters))
    if any(parameter.startswith(SHARED_MEMORY) for parameter in parameters):
        raise RefusedError(
            INVALID, f"input {name[:40]!r}: tensors in shared memory aren't offered; send it in the message."
        )


def check_request_parameters(what: str, names: Collection[str]) -> None:
    """Refuse a request with many parameters, and one with the parameter that is the front's own.

    Args:
        what: What they are called where they stand: `/generate` has them among its fields.
        names: Theirs.

    Raises:
        RefusedError: It has them.
    """
    check_number(what, len(names))
    if DROPPED in names:
        raise RefusedError(INVALID, f"there is no parameter {DROPPED}.")


def seconds(timeout_us: object) -> float | None:
    """Return the request parameter `timeout` in seconds; None where it isn't a positive whole number, or days away."""
    return timeout_us / 1e6 if isinstance(timeout_us, int) and 0 < timeout_us <= LONGEST_TIMEOUT_S * 1e6 else None
