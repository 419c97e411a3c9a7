"""Reads an HTTP inference: JSON, with Triton's binary tensors after it or without, or `/generate`'s."""

import json
from typing import Any

from server.front.inference import (
    IdChoice,
    Inference,
    check_id,
    check_parameters,
    check_request_parameters,
    check_shapes,
    check_timeout,
    seconds,
)
from server.front.refusals import INVALID, RefusedError

MAX_DEPTH = 16
"""Of arrays and objects in each other. A tensor's data, nested by its shape, is the deepest that is of use: 8."""


def read_inference(body: bytes, model: str, header_length: str | None, choose_id: IdChoice) -> Inference:
    """Read the body of `/infer`.

    Args:
        body: As it came.
        model: Its name.
        header_length: The header `Inference-Header-Content-Length`, None where there is none.
        choose_id: Chooses the id.

    Raises:
        RefusedError: It isn't a request, or Triton couldn't bear it.
    """
    json_length = _json_length(header_length, len(body))
    request, tensors = read_json(body[:json_length]), body[json_length:]
    for key in ("inputs", "outputs"):
        for tensor in _objects(request, key):
            parameters = tensor.get("parameters", {})
            if not isinstance(parameters, dict):
                raise RefusedError(INVALID, f"{key}: the parameters of a tensor must be an object.")
            check_parameters(str(tensor.get("name")), parameters)
            if key == "inputs" and not isinstance(tensor.get("shape"), list):
                raise RefusedError(INVALID, "inputs: each must have a shape, a list of sizes.")
    check_shapes(((str(tensor.get("name")), tensor["shape"]) for tensor in _objects(request, "inputs")), len(body))
    parameters = request.get("parameters")
    if isinstance(parameters, dict):
        check_request_parameters("parameters", parameters)
    timeout = parameters.get("timeout") if isinstance(parameters, dict) else None
    return _inference(request, model, choose_id, timeout, tensors, header_length is not None)


def read_generate(body: bytes, model: str, choose_id: IdChoice) -> Inference:
    """Read the body of `/generate`, whose fields are inputs.

    Raises:
        RefusedError: It isn't JSON that Triton could bear.
    """
    request = read_json(body)
    check_request_parameters("fields", request)
    if isinstance(parameters := request.get("parameters"), dict):  # Triton takes them as if they stood beside it
        check_request_parameters("parameters", parameters)
    return _inference(request, model, choose_id, request.get("timeout"), b"", has_tensors=False)


def read_json(body: bytes) -> dict[str, Any]:
    """Read a JSON object within MAX_DEPTH.

    Raises:
        RefusedError: It isn't one.
    """
    try:
        request = json.loads(body, object_pairs_hook=_object)
    except RecursionError:
        raise _too_deep() from None
    except UnicodeDecodeError as error:
        raise RefusedError(INVALID, f"the body must be UTF-8, and byte {error.start} of it isn't.") from None
    except ValueError as error:
        raise RefusedError(INVALID, f"the body isn't JSON: {str(error)[:100]}.") from None
    if not isinstance(request, dict):
        raise RefusedError(INVALID, "the body must be a JSON object.")
    _check_form(request)
    return request


def write_json(request: dict[str, Any]) -> bytes:
    """Write JSON anew: whatever the form that it came in, Triton reads what was read here.

    NaN and infinities, which JSON doesn't have and Triton takes, go on: a stage refuses them by the input's name.
    """
    return json.dumps(request, separators=(",", ":")).encode()


def _inference(
    request: dict[str, Any], model: str, choose_id: IdChoice, timeout: object, tensors: bytes, has_tensors: bool
) -> Inference:
    if not isinstance(given := request.get("id", ""), str):
        raise RefusedError(INVALID, "id must be a text.")
    if request_id := choose_id(model, given):
        check_id(request_id)
        request["id"] = request_id
    check_timeout(timeout)
    text = write_json(request)
    return Inference(model, request_id, seconds(timeout), text + tensors, len(text) if has_tensors else None)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; two parsers would take different ones of two values with the same name."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in names if names.count(name) > 1)
        raise RefusedError(INVALID, f"input {name[:40]!r} already exists: it stands twice in an object of the body.")
    return made


def _json_length(header: str | None, body_length: int) -> int:
    if header is None:
        return body_length
    if not (header.isascii() and header.isdigit() and len(header) < 12 and int(header) <= body_length):
        raise RefusedError(
            INVALID,
            f"Inference-Header-Content-Length must be 0 to the body's {body_length} bytes, got {header[:20]!r}.",
        )
    return int(header)


def _objects(request: dict[str, Any], key: str) -> list[dict[str, Any]]:
    tensors = request.get(key, [])
    if not isinstance(tensors, list) or not all(isinstance(tensor, dict) for tensor in tensors):
        raise RefusedError(INVALID, f"{key} must be a list of objects.")
    return tensors


def _check_form(value: object) -> None:
    """Refuse depth, and names that Triton would read otherwise: its texts end with the first NUL."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(not name or "\0" in name for item in level if isinstance(item, dict) for name in item):
            raise RefusedError(INVALID, "the name of a field must not be empty, nor contain NUL.")
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> RefusedError:
    return RefusedError(INVALID, f"the body has arrays or objects in each other deeper than {MAX_DEPTH}.")
