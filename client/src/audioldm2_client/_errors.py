"""From what tritonclient reports to this package's exceptions: the one place where that is decided.

Triton names the cause by a gRPC status or an HTTP status. Over HTTP several causes share 400 (INVALID_ARG, CANCELLED,
and everything without a status of its own), so there the tag at the start of the server's message decides.
"""

import re

from audioldm2_client._exceptions import (
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._request import InferenceRequest
from audioldm2_client._url import ServerAddress

# What Triton puts before the words of the model that refused the request.
_TRITON_PREFIX = re.compile(r"^(?:\[request id: [^\]]*\] |in ensemble '[^']*', )+")

# UNAVAILABLE is both gRPC's own word for "no connection" and Triton's for "busy"; gRPC's texts are these.
_NO_CONNECTION = re.compile(
    r"failed to connect|errors resolving|resolution failed|name resolution|socket closed|connection reset|broken pipe"
    r"|recvmsg|goaway|endpoint closing|stream removed|keepalive|empty address list",
    re.IGNORECASE,
)

_CLASS_OF_STATUS: dict[str, type[AudioLDM2Error]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidRequestError,
    "StatusCode.UNAVAILABLE": ServerBusyError,
    "StatusCode.CANCELLED": RequestCancelledError,
    "400": InvalidRequestError,
    "499": RequestCancelledError,
    "503": ServerBusyError,
}


def error_from_status(
    status: str | None, message: str | None, request: InferenceRequest, address: ServerAddress
) -> AudioLDM2Error:
    """Say what a failed inference means.

    Args:
        status: `InferenceServerException.status()`: "StatusCode.UNAVAILABLE" over gRPC, "503" over HTTP.
        message: `InferenceServerException.message()`: Triton's words.
        request: what was asked.
        address: who was asked.
    """
    raw = message or ""
    if status == "StatusCode.DEADLINE_EXCEEDED":  # gRPC's own clock; Triton doesn't use this status
        return client_deadline_error(request, address)
    if status == "StatusCode.UNAVAILABLE" and _NO_CONNECTION.search(raw):
        return unreachable_error(raw, request, address)
    words = _TRITON_PREFIX.sub("", raw)
    error_class = _classify(status, words)
    return error_class(_sentence(error_class, words, request, address), server_message=raw, request_id=request.id)


def _classify(status: str | None, words: str) -> type[AudioLDM2Error]:
    if words.startswith("Request for unknown model"):
        return ModelNotFoundError
    error_class = _CLASS_OF_STATUS.get(status or "", ServerFaultError)
    if status == "400" and words.startswith("[CANCELLED]"):
        error_class = RequestCancelledError
    if status in ("400", "499", "StatusCode.CANCELLED") and words.startswith("[DEADLINE]"):
        error_class = DeadlineExceededError
    return error_class


def _sentence(error_class: type[AudioLDM2Error], words: str, request: InferenceRequest, address: ServerAddress) -> str:
    words = words.strip() or "the server gave no reason"
    if error_class is ServerFaultError:
        return f"the server failed on request {request.id}: {words}"
    if error_class is ModelNotFoundError:
        return (
            f"the server at {address} has no model {request.model_name!r} ready: {words}; "
            "check the model's name and the server's log"
        )
    return words


def client_deadline_error(request: InferenceRequest, address: ServerAddress) -> DeadlineExceededError:
    """The client's own timeout has passed."""
    return DeadlineExceededError(
        f"no answer from {address} within {request.timeout_s:g} s (request {request.id}); "
        "allow a longer timeout, or ask for fewer steps or shorter audio",
        request_id=request.id,
    )


def unreachable_error(reason: str, request: InferenceRequest, address: ServerAddress) -> ServerUnreachableError:
    """There is no connection to a Triton server, or it was lost."""
    return ServerUnreachableError(
        f"can't reach a Triton server at {address} ({reason}); "
        f"check that it runs and that this is its {address.protocol_name} port, {address.usual_port} unless configured",
        request_id=request.id,
    )
