"""From arguments in Python to input tensors on the wire. Pure: shared by every protocol, blocking or not."""

import math
import numbers
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from audioldm2_client._exceptions import InvalidRequestError

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class GenerationOptions:
    """The optional inputs of a generation. None is not sent: the server's own default holds.

    Ranges are the server's business, they are not checked here.
    """

    negative_prompt: str | Sequence[str] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    audio_length_in_s: float | None = None
    num_waveforms_per_prompt: int | None = None
    seed: int | None = None
    scheduler: str | None = None
    eta: float | None = None


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
    """All that a transport has to know to run one inference.

    Attributes:
        model_name: the ensemble.
        id: sent with the request; the server's log names it.
        timeout_s: the time allowed for the call, seconds; for one attempt of several, what is left of it.
        inputs: only those that the caller gave.
        prompts: the prompts as text.
    """

    model_name: str
    id: str
    timeout_s: float
    inputs: tuple[InputTensor, ...]
    prompts: tuple[str, ...]

    @property
    def timeout_us(self) -> int:
        """`timeout_s` in Triton's unit, whole microseconds; never 0, which would mean none."""
        return math.ceil(self.timeout_s * 1e6)


def new_request_id() -> str:
    """Return an id that nobody can guess: whoever knows a request's id can watch and cancel it."""
    return uuid.uuid4().hex


def build_request(
    prompt: str | Sequence[str],
    options: GenerationOptions,
    *,
    model_name: str,
    request_id: str,
    timeout_s: float,
) -> InferenceRequest:
    """Encode the prompt and those options that are not None.

    Raises:
        TypeError: a value of the wrong type.
        ValueError: `timeout_s` is not a positive number of seconds.
        InvalidRequestError: a value that can't be put on the wire: no prompt at all, text that isn't Unicode, a number
            too large for the input's type.
    """
    given = ((field.name, getattr(options, field.name)) for field in fields(options))
    inputs = [_ENCODERS[name](name, value) for name, value in given if value is not None]
    prompts = _texts("prompt", prompt)
    return InferenceRequest(
        model_name=model_name,
        id=request_id,
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


def _encode_text(name: str, value: object) -> InputTensor:
    _check_type(name, value, str, "a str")
    return _encode_texts(name, str(value))


def _encode_integer(name: str, value: Any, dtype: type[np.signedinteger[Any]]) -> InputTensor:
    _check_type(name, value, numbers.Integral, "an int")
    limits = np.iinfo(dtype)
    if not limits.min <= value <= limits.max:
        raise InvalidRequestError(f"{name} must fit in a {limits.bits}-bit signed integer; got {value}")
    return InputTensor(name, f"INT{limits.bits}", np.array([value], dtype=dtype))


def _encode_int32(name: str, value: object) -> InputTensor:
    return _encode_integer(name, value, np.int32)


def _encode_int64(name: str, value: object) -> InputTensor:
    return _encode_integer(name, value, np.int64)


def _encode_float32(name: str, value: Any) -> InputTensor:
    _check_type(name, value, numbers.Real, "a number")
    if _FLOAT32_MAX < abs(value) < math.inf:  # infinity and NaN can be sent: the server names the bounds
        raise InvalidRequestError(f"{name} must fit in a 32-bit float; got {value}")
    return InputTensor(name, "FP32", np.array([value], dtype=np.float32))


_ENCODERS: dict[str, Callable[[str, Any], InputTensor]] = {
    "negative_prompt": _encode_texts,
    "num_inference_steps": _encode_int32,
    "guidance_scale": _encode_float32,
    "audio_length_in_s": _encode_float32,
    "num_waveforms_per_prompt": _encode_int32,
    "seed": _encode_int64,
    "scheduler": _encode_text,
    "eta": _encode_float32,
}
