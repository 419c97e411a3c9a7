"""From what grpcio and httpx return or raise to outputs or exceptions: shared by blocking and asyncio I/O.

Where a connection is made and nobody there understands us, the caller finds out what the port speaks (`_port_probe`)
and hands it in: `should_probe_grpc` and `should_probe_http` say when that is worthwhile.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from audioldm2_client import _kserve
from audioldm2_client._errors import error_from_answer, error_from_status, other_protocol_error, unreachable_error
from audioldm2_client._exceptions import AudioLDM2Error, ServerFaultError
from audioldm2_client._gateway import gateway_error
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GetTensor
from audioldm2_client._url import Scheme, ServerAddress

if TYPE_CHECKING:
    import httpx

ERROR_BODY_LIMIT = 65536
"""How much of an answer is read that has no outputs, bytes."""

# What grpcio says of a port that is there, and of one that is not, or that is known well enough.
_CONNECTED = re.compile(r"failed to connect to all addresses", re.IGNORECASE)
_NOT_CONNECTED = re.compile(
    r"refused|timed? ?out|timeout|unreachable|no route|certificate[ _]verify|proxy", re.IGNORECASE
)

_PROXY_STATUS = re.compile(r"HTTP proxy returned response code (\d{3})|^(\d{3})\b")


class HttpAnswer(NamedTuple):
    """An answer over HTTP, read to its end; of one without outputs, the beginning.

    Attributes:
        status: such as 200.
        headers: names in lower case.
        body: decompressed.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


def outputs_from_message(message: Any, request: InferenceRequest) -> GetTensor:
    """Return the outputs of a `ModelInferResponse`.

    Raises:
        ServerFaultError: it contradicts itself.
    """
    from audioldm2_client import _kserve_grpc

    try:
        return _kserve_grpc.parse_message(message).get
    except _kserve.ProtocolError as error:
        raise ServerFaultError(
            f"the server's answer to request {request.id} can't be read: {error}", request_id=request.id
        ) from error


def outputs_from_answer(answer: HttpAnswer, request: InferenceRequest, address: ServerAddress) -> GetTensor:
    """Return the outputs of an answer over HTTP.

    Raises:
        AudioLDM2Error: it has none.
    """
    if answer.status != 200:
        raise error_from_answer(answer.status, answer.headers, answer.body, request, address)
    try:
        return _kserve.parse_body(answer.body, answer.headers).get
    except _kserve.ProtocolError as error:
        raise gateway_error(answer.status, answer.headers, answer.body, request, address) from error


def says_ready(answer: HttpAnswer) -> bool:
    """Return whether the answer is Triton's word for a model that is ready, which is an empty one."""
    return answer.status == 200 and not answer.body.lstrip().startswith(b"<")


def error_from_grpc(
    error: Any, request: InferenceRequest, address: ServerAddress, spoken: Scheme | None
) -> AudioLDM2Error:
    """Say what a `grpc.RpcError` means; `spoken` is what the port speaks, where that was found out."""
    if spoken is not None and spoken != address.scheme:
        return other_protocol_error(spoken, request, address)
    details = error.details()
    if address.proxy is not None and (found := _PROXY_STATUS.search(details or "")):
        return gateway_error(int(found[1] or found[2]), {}, b"", request, address)
    metadata = _texts(*(error.initial_metadata() or ()), *(error.trailing_metadata() or ()))
    return error_from_status(str(error.code()), details, request, address, metadata)


def should_probe_grpc(error: Any) -> bool:
    """Return whether the port is there and doesn't speak as the URL says."""
    details = error.details() or ""
    return bool(_CONNECTED.search(details)) and not _NOT_CONNECTED.search(details)


def error_from_http(
    error: Exception, request: InferenceRequest, address: ServerAddress, spoken: Scheme | None
) -> AudioLDM2Error:
    """Say what an exception of httpx means; `spoken` is what the port speaks, where that was found out."""
    import httpx

    if spoken is not None and spoken != address.scheme:
        return other_protocol_error(spoken, request, address)
    if isinstance(error, httpx.ProxyError) and (found := _PROXY_STATUS.search(str(error))):
        return gateway_error(int(found[1] or found[2]), {}, b"", request, address)
    not_sent = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, httpx.UnsupportedProtocol, httpx.InvalidURL)
    return unreachable_error(_reason(error), request, address, sent=not isinstance(error, not_sent))


def should_probe_http(error: Exception) -> bool:
    """Return whether the port is there and doesn't speak as the URL says, or has hung up on us."""
    import httpx

    if isinstance(error, httpx.ConnectError):
        return any(isinstance(e, EOFError) or "SSL" in f"{type(e).__name__} {e}" for e in _causes(error)) and (
            "CERTIFICATE" not in str(error).upper()
        )
    return isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError))


def http_errors() -> tuple[type[Exception], ...]:
    """Return everything that httpx raises for what a server or the network does."""
    import httpx

    return (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError)


def should_read_on(response: "httpx.Response", received: int) -> bool:
    """Return whether more of an answer's body is wanted."""
    return response.status_code == 200 or received < ERROR_BODY_LIMIT


def _texts(*pairs: Iterable[Any]) -> dict[str, str]:
    return {str(key): value for key, value in pairs if isinstance(value, str)}


def _causes(error: BaseException | None) -> list[BaseException]:
    causes: list[BaseException] = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    return causes


def _reason(error: Exception) -> str:
    """The words of the first cause that has some; the operating system's, where it has given any."""
    causes = _causes(error)
    numbered = [str(cause) for cause in causes if isinstance(cause, OSError) and cause.errno]
    return next((words for words in (*numbered, *map(str, causes)) if words), type(causes[-1]).__name__)
