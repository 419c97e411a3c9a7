"""From arguments in Python to input tensors on the wire. Pure: shared by every protocol, blocking or not."""

import math
import numbers
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from audioldm2_client._exceptions import InvalidRequestError
from audioldm2_client._options import OPTIONS, GenerationOptions, Option, given_options

MAX_REQUEST_ID_BYTES = 128
"""The server's limit for an id by which the model `jobs` can be asked."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class InputTensor:
    """One input on the wire.

    Attributes:
        name: the input's name in the model's config.pbtxt.
        datatype: Triton's name of the type: BYTES, INT32, INT64 or FP32.
        data: one-dimensional; dtype object with `bytes` in it for BYTES.
    """

    name: str
    datatype: str
    data: npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class InferenceRequest:
    """One inference, complete for any transport.

    Attributes:
        model_name: the ensemble.
        id: sent with the request; the server's log names it.
        timeout_s: the time allowed for the call, seconds; for one of several attempts, the time that remains.
        inputs: the given ones.
        prompts: the prompts as text.
        headers: sent with this request, besides those of the client.
    """

    model_name: str
    id: str
    timeout_s: float
    inputs: tuple[InputTensor, ...]
    prompts: tuple[str, ...]
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def timeout_us(self) -> int:
        """`timeout_s` in Triton's unit, whole microseconds; never 0, which would mean none."""
        return math.ceil(self.timeout_s * 1e6)


def new_request_id() -> str:
    """Return an id that can't be guessed: a request's id is enough to watch and cancel it."""
    return uuid.uuid4().hex


def check_request_id(request_id: str) -> str:
    """Return a caller's own id.

    Raises:
        TypeError: not text.
        InvalidRequestError: no 1 to 128 bytes of UTF-8, or something in it that can't be printed.
    """
    _check_type("request_id", request_id, str, "a str")
    wanted = f"request_id must be printable text of 1 to {MAX_REQUEST_ID_BYTES} bytes in UTF-8"
    if not request_id.isprintable():
        raise InvalidRequestError(f"{wanted}; got {request_id[:MAX_REQUEST_ID_BYTES]!r}")
    if not 1 <= (size := len(request_id.encode())) <= MAX_REQUEST_ID_BYTES:
        raise InvalidRequestError(f"{wanted}; got {size}")
    return request_id


def build_request(
    prompt: str | Sequence[str],
    options: GenerationOptions,
    *,
    model_name: str,
    request_id: str,
    timeout_s: float,
) -> InferenceRequest:
    """Encode the prompt and those options that are not None.

    Args:
        prompt: one text, or several.
        options: what `generate` is given besides.
        model_name: the ensemble.
        request_id: as `new_request_id` makes them, or a caller's own, checked here.
        timeout_s: time allowed for the generation, seconds.

    Raises:
        TypeError: a value of the wrong type, or an unknown option.
        ValueError: `timeout_s` is not a positive number of seconds.
        InvalidRequestError: a value that can't be put on the wire: no prompt at all, text that isn't Unicode, a number
            too large for the input's type.
    """
    if unknown := options.keys() - OPTIONS.keys():
        raise TypeError(f"unknown option {min(unknown)!r}; the options are {', '.join(OPTIONS)}")
    inputs = [_encode(name, value, OPTIONS[name]) for name, value in given_options(options).items()]
    prompts = _texts("prompt", prompt)
    return InferenceRequest(
        model_name=model_name,
        id=check_request_id(request_id),
        timeout_s=check_timeout(timeout_s),
        inputs=(_encode_texts("prompt", prompts), *inputs),
        prompts=prompts,
    )


def check_timeout(timeout_s: float) -> float:
    """Return `timeout_s` as a float.

    Raises:
        TypeError: not a number.
        ValueError: not positive and finite.
    """
    _check_type("timeout_s", timeout_s, numbers.Real, "a number")
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s must be a positive number of seconds; got {timeout_s!r}")
    return float(timeout_s)


def _check_type(name: str, value: object, wanted: type, description: str) -> None:
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise TypeError(f"{name} must be {description}; got {type(value).__name__}")


def _texts(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    _check_type(name, value, Sequence, "a str or a sequence of str")
    for item in value:
        _check_type(f"each item of {name}", item, str, "a str")
    if not value:
        raise InvalidRequestError(f"{name} must hold at least one text; got an empty sequence")
    return tuple(value)


def _encode_texts(name: str, value: str | Sequence[str]) -> InputTensor:
    try:
        encoded = [text.encode() for text in _texts(name, value)]
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{name} must be Unicode text; got {error.object!r}") from error
    # dtype object: numpy's own bytes type would drop trailing NUL characters.
    return InputTensor(name, "BYTES", np.array(encoded, dtype=np.object_))


def _encode(name: str, value: Any, option: Option) -> InputTensor:
    if option.datatype == "BYTES":
        if not option.one_per_prompt:
            _check_type(name, value, str, "a str")
        return _encode_texts(name, value)
    if option.datatype == "FP32":
        return _encode_float32(name, value)
    return _encode_integer(name, value, np.int32 if option.datatype == "INT32" else np.int64)


def _encode_integer(name: str, value: Any, dtype: type[np.signedinteger[Any]]) -> InputTensor:
    _check_type(name, value, numbers.Integral, "an int")
    limits = np.iinfo(dtype)
    if not limits.min <= value <= limits.max:
        raise InvalidRequestError(f"{name} must fit in a {limits.bits}-bit signed integer; got {value}")
    return InputTensor(name, f"INT{limits.bits}", np.array([value], dtype=dtype))


def _encode_float32(name: str, value: Any) -> InputTensor:
    _check_type(name, value, numbers.Real, "a number")
    if _FLOAT32_MAX < abs(value) < math.inf:  # infinity and NaN can be sent: the server names the bounds
        raise InvalidRequestError(f"{name} must fit in a 32-bit float; got {value}")
    return InputTensor(name, "FP32", np.array([value], dtype=np.float32))
