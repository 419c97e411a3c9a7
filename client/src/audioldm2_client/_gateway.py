"""What an HTTP answer means that isn't Triton's: a proxy, a load balancer or another server has given it. Pure."""

import html
import http
import re
import time
from collections.abc import Mapping

from audioldm2_client._exceptions import (
    AccessDeniedError,
    AudioLDM2Error,
    InvalidRequestError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)
from audioldm2_client._request import InferenceRequest
from audioldm2_client._url import ServerAddress

BUSY = frozenset({425, 429, 503, 529})
"""Nothing was done."""

BEHIND = frozenset({502, 504, *range(520, 525)})
"""A gateway couldn't reach the server, or waited for too long; those above 504 are Cloudflare's."""

_DENIED = frozenset({401, 403, 407, 511})
_TOO_LARGE = 413
_WRONG_PLACE = frozenset({404, 405, 410, 421, 426})
_SHOWN_CHARACTERS = 80


def gateway_error(
    status: int, headers: Mapping[str, str], body: bytes, request: InferenceRequest, address: ServerAddress
) -> AudioLDM2Error:
    """Say what an answer means.

    Args:
        status: of HTTP.
        headers: names in lower case.
        body: the beginning of it is enough.
        request: what was asked.
        address: where.
    """
    error_class, advice = _meaning(status, headers, body)
    return error_class(
        f"{address} answered {_named(status)}{_excerpt(body)}, which isn't Triton's answer: {advice}{through(address)}",
        server_message=body.decode(errors="replace"),
        request_id=request.id,
        safe_to_retry=status in BUSY | BEHIND,
        retry_after_s=retry_after_s(headers),
        misconfigured=error_class is ServerUnreachableError and status not in BEHIND,
    )


def through(address: ServerAddress) -> str:
    """Return the words about a proxy for the end of a message; none without one."""
    return f"; this goes through {address.proxy}" if address.proxy is not None else ""


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the value of `Retry-After`, seconds or a date, as seconds from now; None where there is none."""
    import email.utils  # takes 10 ms

    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _meaning(status: int, headers: Mapping[str, str], body: bytes) -> tuple[type[AudioLDM2Error], str]:
    if status in BUSY:
        return ServerBusyError, "it has no room for the request now; try again later"
    if status in BEHIND:
        return (
            ServerUnreachableError,
            "it reaches no server behind it; check that Triton runs there, or try again later",
        )
    if status in _DENIED:
        return AccessDeniedError, "access is denied; check the API key, the other headers, or the proxy's password"
    if status == _TOO_LARGE:
        return InvalidRequestError, "the request's body is too large for it; send fewer or shorter prompts"
    if 300 <= status < 400:
        target = headers.get("location", "")
        return (
            ServerUnreachableError,
            f"redirects aren't followed; use the URL of the server itself (it names {target!r})",
        )
    if status == 400 and re.search(rb"(?i)\bhttps\b", body):
        return ServerUnreachableError, "it wants TLS; use https:// in the URL"
    if status < 300 or status in _WRONG_PLACE:
        return ServerUnreachableError, "check the URL's host, port and base path, which ends before /v2"
    return ServerFaultError, "see the log of the gateway or server that gave it"


def _named(status: int) -> str:
    try:
        return f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _excerpt(body: bytes) -> str:
    """The first words of a page or text, in brackets."""
    text = body[:4096].decode(errors="replace")
    text = re.sub(r"(?is)<(style|script)\b.*?(?:</\1>|$)|<[^>]*>|<!--.*?-->", " ", text)
    words = " ".join("".join(c if c.isprintable() else " " for c in html.unescape(text)).split())
    if not words:
        return ""
    return f" ({words[:_SHOWN_CHARACTERS].strip()}{'...' if len(words) > _SHOWN_CHARACTERS else ''})"
