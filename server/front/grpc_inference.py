"""Reads a gRPC inference: one `ModelInferRequest` behind gRPC's prefix."""

import struct
from typing import Any

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

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
from server.front.refusals import ENCODING, INVALID, RefusedError

_PREFIX = struct.Struct(">?I")  # whether the message is compressed, and its length


def read_inference(body: bytes, choose_id: IdChoice) -> Inference:
    """Read the body of ModelInfer.

    Args:
        body: As it came.
        choose_id: Chooses the id.

    Raises:
        RefusedError: It isn't a request, or Triton couldn't bear it.
    """
    request = _read(service_pb2.ModelInferRequest, body)
    check_shapes(((tensor.name, tensor.shape) for tensor in request.inputs), len(body))
    check_request_parameters("parameters", request.parameters)
    for tensor in (*request.inputs, *request.outputs):
        check_parameters(tensor.name, tensor.parameters)
    request.id = choose_id(request.model_name, request.id)
    check_id(request.id)
    timeout = request.parameters["timeout"].int64_param if "timeout" in request.parameters else None
    check_timeout(timeout)
    message = request.SerializeToString()
    return Inference(request.model_name, request.id, seconds(timeout), _PREFIX.pack(False, len(message)) + message)


def read_model_name(body: bytes) -> str:
    """Read the body of ModelReady or ModelMetadata: both have the name at the same place.

    Raises:
        RefusedError: It isn't such a message.
    """
    return str(_read(service_pb2.ModelReadyRequest, body).name)


def check_message(body: bytes) -> None:
    """Read the body of a call whose message says nothing that is looked at.

    Raises:
        RefusedError: It isn't one message.
    """
    _read(service_pb2.ModelReadyRequest, body)  # Health.Check has its text at the same place, the others are empty


def _read(message_class: Any, body: bytes) -> Any:
    try:
        return message_class.FromString(_message(body))
    except (DecodeError, RecursionError):
        raise RefusedError(INVALID, f"the message isn't a {message_class.DESCRIPTOR.name}.") from None


def _message(body: bytes) -> bytes:
    if len(body) < _PREFIX.size:
        raise RefusedError(INVALID, "the call has no message.")
    is_compressed, length = _PREFIX.unpack_from(body)
    if is_compressed:
        raise RefusedError(ENCODING, "compressed messages aren't taken: send it without grpc-encoding.")
    if length != len(body) - _PREFIX.size:
        raise RefusedError(INVALID, "the call must have one message, as long as its prefix says.")
    return body[_PREFIX.size :]
