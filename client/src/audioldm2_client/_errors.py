"""From what gRPC and HTTP report to this package's exceptions: the one place where that is decided.

Triton names the cause by a gRPC status or an HTTP status. Over HTTP several causes share 400 (INVALID_ARG, CANCELLED,
and everything without a status of its own), so there the tag at the start of the server's message decides. What isn't
Triton's answer is in `_gateway`.
"""

import re
from collections.abc import Mapping

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
from audioldm2_client._gateway import gateway_error, retry_after_s, through
from audioldm2_client._kserve import parse_error
from audioldm2_client._request import InferenceRequest
from audioldm2_client._url import Scheme, ServerAddress

# What Triton puts before the words of the model that refused the request.
_TRITON_PREFIX = re.compile(r"\[request id: [^\]]*\] |in ensemble '[^']*', ")

# Said by the server itself, or by the front before it, whatever words follow.
_UNAVAILABLE = "[UNAVAILABLE]"

# UNAVAILABLE is both gRPC's own word for "no connection" and Triton's for "busy"; gRPC's texts are these.
_NO_CONNECTION = re.compile(
    r"failed to connect|errors resolving|resolution failed|name resolution|socket closed|connection reset|broken pipe"
    r"|recvmsg|goaway|endpoint closing|stream removed|keepalive|ping timeout|empty address list|upstream connect error"
    r"|received http2 header with status",
    re.IGNORECASE,
)

# Among those, the texts of connections that were never made, so that nothing was sent.
_NOT_SENT = re.compile(
    r"failed to connect|errors resolving|resolution failed|name resolution|empty address list", re.IGNORECASE
)

# OpenSSL's words, over either protocol. Nothing was sent then, but trying again won't help.
_CERTIFICATE_REFUSED = re.compile(r"certificate[ _]verify[ _]failed", re.IGNORECASE)

# Triton's own words where `--http-restricted-api` or `--grpc-restricted-protocol` want a header.
_RESTRICTED = re.compile(r"^This (?:API|protocol) is restricted", re.IGNORECASE)

# Where a gateway or another web server answers a gRPC call with a status of HTTP.
_HTTP_STATUS = re.compile(r"received http2 header with status: (\d{3})", re.IGNORECASE)

# A gRPC server that has no such service.
_OTHER_SERVICE = re.compile(r"^$|unknown service|unknown method|method not found|not implemented", re.IGNORECASE)

# gRPC's and its proxies' words for a message above a limit.
_TOO_LARGE = re.compile(r"larger than|too large|exceeds? .*(?:size|limit)", re.IGNORECASE)

# Triton's whole answer, over HTTP, to a path that it doesn't have.
_NO_SUCH_PATH = "Not Found"

_SPOKEN: dict[Scheme, str] = {
    "grpc": "gRPC without TLS",
    "grpcs": "gRPC over TLS",
    "http": "HTTP without TLS",
    "https": "HTTP over TLS",
}

_CLASS_OF_STATUS: dict[str, type[AudioLDM2Error]] = {
    "StatusCode.INVALID_ARGUMENT": InvalidRequestError,
    "StatusCode.UNAVAILABLE": ServerBusyError,
    "StatusCode.CANCELLED": RequestCancelledError,
    "StatusCode.UNAUTHENTICATED": AccessDeniedError,
    "StatusCode.PERMISSION_DENIED": AccessDeniedError,
    "StatusCode.RESOURCE_EXHAUSTED": ServerBusyError,
    "400": InvalidRequestError,
    "401": AccessDeniedError,
    "403": AccessDeniedError,
    "499": RequestCancelledError,
    "503": ServerBusyError,
}

# Statuses of HTTP that Triton's own answers have; it names no other in a sentence of its own.
_TRITONS_STATUSES = frozenset({"400", "401", "403", "404", "409", "499", "500", "501", "503"})


def error_from_answer(
    status: int, headers: Mapping[str, str], body: bytes, request: InferenceRequest, address: ServerAddress
) -> AudioLDM2Error:
    """Say what an answer over HTTP means that has no outputs.

    Args:
        status: of HTTP.
        headers: names in lower case.
        body: the whole of it, or the beginning of a large one.
        request: what was asked.
        address: who was asked.
    """
    words = parse_error(body)
    if words is None or words == _NO_SUCH_PATH or str(status) not in _TRITONS_STATUSES:
        return gateway_error(status, headers, body, request, address)
    return error_from_status(str(status), words, request, address, headers)


def error_from_status(
    status: str | None,
    message: str | None,
    request: InferenceRequest,
    address: ServerAddress,
    headers: Mapping[str, str] | None = None,
) -> AudioLDM2Error:
    """Say what a failed inference means.

    Args:
        status: "StatusCode.UNAVAILABLE" over gRPC, "503" over HTTP.
        message: Triton's words, or gRPC's.
        request: what was asked.
        address: who was asked.
        headers: of the answer, names in lower case; over gRPC its metadata.
    """
    raw = message or ""
    if status == "StatusCode.DEADLINE_EXCEEDED":  # gRPC's own clock; Triton doesn't use this status
        return client_deadline_error(request, address)
    if status is not None and status.startswith("StatusCode.") and (found := _HTTP_STATUS.search(raw)):
        return gateway_error(int(found[1]), headers or {}, b"", request, address)
    words = _without_prefixes(raw, request)
    if status == "StatusCode.UNAVAILABLE" and not words.startswith(_UNAVAILABLE) and _NO_CONNECTION.search(raw):
        return unreachable_error(raw, request, address, sent=not _NOT_SENT.search(raw))
    if status == "StatusCode.UNIMPLEMENTED" and _OTHER_SERVICE.search(raw):
        return unreachable_error(
            f"a gRPC server that isn't Triton answers: {raw or status}",
            request,
            address,
            sent=False,
            misconfigured=True,
        )
    error_class = _classify(status, words)
    return error_class(
        _sentence(error_class, words, request, address),
        server_message=raw,
        request_id=request.id,
        safe_to_retry=error_class is ServerBusyError,
        retry_after_s=retry_after_s(headers or {}),
    )


def _without_prefixes(raw: str, request: InferenceRequest) -> str:
    """Return the words without Triton's own; a caller's id may have brackets in it."""
    known = f"[request id: {request.id}] "
    while True:
        if raw.startswith(known):
            raw = raw.removeprefix(known)
        elif found := _TRITON_PREFIX.match(raw):
            raw = raw[found.end() :]
        else:
            return raw


def _classify(status: str | None, words: str) -> type[AudioLDM2Error]:
    if words.startswith("Request for unknown model"):
        return ModelNotFoundError
    if _RESTRICTED.match(words):
        return AccessDeniedError
    if status == "StatusCode.RESOURCE_EXHAUSTED" and _TOO_LARGE.search(words):
        return InvalidRequestError
    error_class = _CLASS_OF_STATUS.get(status or "", ServerFaultError)
    if words.startswith(_UNAVAILABLE) and status in ("400", "500"):
        error_class = ServerBusyError
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
    reason: str, request: InferenceRequest, address: ServerAddress, *, sent: bool, misconfigured: bool = False
) -> ServerUnreachableError:
    """There is no connection to a Triton server, or, where something may have been sent, it was lost."""
    misconfigured = misconfigured or bool(_CERTIFICATE_REFUSED.search(reason))
    return ServerUnreachableError(
        f"can't reach a Triton server at {address} ({reason}); "
        f"check that it runs and that this is its {address.protocol_name} port, {address.usual_port} unless configured"
        f"{through(address)}{f' (request {request.id})' if sent else ''}",
        request_id=request.id,
        safe_to_retry=not sent and not misconfigured,
        misconfigured=misconfigured,
    )


def other_protocol_error(spoken: Scheme, request: InferenceRequest, address: ServerAddress) -> ServerUnreachableError:
    """The port is there, and speaks something else than the URL says."""
    own_port = f", or that it names the server's {address.protocol_name} port, {address.usual_port} unless configured"
    return ServerUnreachableError(
        f"can't reach a Triton server at {address}: this port speaks {_SPOKEN[spoken]}, not {_SPOKEN[address.scheme]}; "
        f"check that the URL is {spoken}://{address.target.partition('/')[0]}"
        f"{'' if spoken.startswith(address.protocol) else own_port}",
        request_id=request.id,
        misconfigured=True,
    )
