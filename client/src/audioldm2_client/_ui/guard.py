"""Refuse HTTP requests that the page doesn't make.

Gradio has more than the page needs: uploads, files, a proxy, an interface for programs. None of it can be reached here.
"""

from typing import Any
from urllib.parse import urlsplit

from starlette.responses import PlainTextResponse

from audioldm2_client._ui.markup import RESULTS_PATH

LOOPBACK_NAMES = frozenset({"127.0.0.1", "localhost", "::1"})

# What the page itself requests.
_PATHS = frozenset({"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"})
_PATH_STARTS = (
    RESULTS_PATH,
    "/assets/",
    "/static/",
    "/theme.css",
    "/gradio_api/heartbeat/",
    "/gradio_api/queue/",
    "/gradio_api/startup-events",
)

# The page loads nothing from elsewhere, whatever its scripts try, and can't be embedded.
_CONTENT_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self'; form-action 'self'; "
    "base-uri 'self'; frame-ancestors 'none'"
)
_HEADERS = [
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """ASGI middleware that refuses requests that the page doesn't make, and sets headers."""

    def __init__(self, app: Any, allowed_hosts: frozenset[str] | None) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            if reason := refusal(scope["path"], headers, self._allowed_hosts):
                await PlainTextResponse(reason, 403)(scope, receive, send)
            else:
                await self._app(scope, receive, _with_headers(send))


def refusal(path: str, headers: dict[str, str], allowed_hosts: frozenset[str] | None) -> str | None:
    """Return why a request is refused; None where it isn't.

    Args:
        path: the path of its URL.
        headers: its headers, names in lower case.
        allowed_hosts: the names that the `Host` header may have; None allows all. A limit keeps other websites from
            reaching the page through a name of theirs that resolves to 127.0.0.1 (DNS rebinding).
    """
    host = headers.get("host", "")
    if allowed_hosts is not None and urlsplit(f"//{host}").hostname not in allowed_hosts:
        return "this page is only for the machine that it runs on"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != host:
        return "this page can't be used from another one"
    if path not in _PATHS and not path.startswith(_PATH_STARTS):
        return "there is nothing here"
    return None


def _with_headers(send: Any) -> Any:
    async def send_with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_HEADERS]}
        await send(message)

    return send_with_headers
