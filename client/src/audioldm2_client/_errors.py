"""From what tritonclient reports to this package's exceptions: the one place where that is decided.

Triton names the cause by a gRPC status or an HTTP status. Over HTTP several causes share 400 (INVALID_ARG, CANCELLED,
and everything without a status of its own), so there the tag at the start of the server's message decides.
"""

import re

from audioldm2_client._exceptions import (
    AccessDeniedError,
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
    r"|recvmsg|goaway|endpoint closing|stream removed|keepalive|empty address list|upstream connect error"
    r"|received http2 header with status",
    re.IGNORECASE,
)

# Among those, the texts of connections that were never made, so that nothing was sent.
_NOT_SENT = re.compile(
    r"failed to connect|errors resolving|resolution failed|name resolution|empty address list", re.IGNORECASE
)

CERTIFICATE_REFUSED = re.compile(r"certificate[ _]verify[ _]failed", re.IGNORECASE)
"""OpenSSL's words, over either protocol. Nothing was sent then, but trying again won't help."""

# Triton's own words where `--http-restricted-api` or `--grpc-restricted-protocol` want a header.
_RESTRICTED = re.compile(r"^This (?:API|protocol) is restricted", re.IGNORECASE)

_CLASS_OF_STATUS: dict[str, type[AudioLDM2Error]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidRequestError,
    "StatusCode.UNAVAILABLE": ServerBusyError,
    "StatusCode.CANCELLED": RequestCancelledError,
    "StatusCode.UNAUTHENTICATED": AccessDeniedError,
    "StatusCode.PERMISSION_DENIED": AccessDeniedError,
    "400": InvalidRequestError,
    "401": AccessDeniedError,
    "403": AccessDeniedError,
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
        return unreachable_error(raw, request, address, sent=not _NOT_SENT.search(raw))
    words = _TRITON_PREFIX.sub("", raw)
    error_class = _classify(status, words)
    return error_class(
        _sentence(error_class, words, request, address),
        server_message=raw,
        request_id=request.id,
        safe_to_retry=error_class is ServerBusyError,
    )


def _classify(status: str | None, words: str) -> type[AudioLDM2Error]:
    if words.startswith("Request for unknown model"):
        return ModelNotFoundError
    if _RESTRICTED.match(words):
        return AccessDeniedError
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
    if error_class is AccessDeniedError:
        return f"the server at {address} denies access: {words}; check the API key or the other headers"
    return words


def client_deadline_error(request: InferenceRequest, address: ServerAddress) -> DeadlineExceededError:
    """The client's own timeout has passed."""
    return DeadlineExceededError(
        f"no answer from {address} within {request.timeout_s:g} s (request {request.id}); "
        "allow a longer timeout, or ask for fewer steps or shorter audio",
        request_id=request.id,
    )


def cancelled_here_error(request: InferenceRequest) -> RequestCancelledError:
    """This client itself has cancelled the request."""
    return RequestCancelledError(f"request {request.id} was cancelled by this client", request_id=request.id)


def not_ready_error(model_name: str, addresses: str, timeout_s: float) -> DeadlineExceededError:
    """No server became ready in time."""
    return DeadlineExceededError(
        f"model {model_name!r} wasn't ready at {addresses} within {timeout_s:g} s; "
        "check the server's log, or wait longer"
    )


def unreachable_error(
    reason: str, request: InferenceRequest, address: ServerAddress, *, sent: bool
) -> ServerUnreachableError:
    """There is no connection to a Triton server, or, where something may have been sent, it was lost."""
    return ServerUnreachableError(
        f"can't reach a Triton server at {address} ({reason}); "
        f"check that it runs and that this is its {address.protocol_name} port, {address.usual_port} unless configured",
        request_id=request.id,
        safe_to_retry=not sent and not CERTIFICATE_REFUSED.search(reason),
    )
