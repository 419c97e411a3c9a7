"""Where the servers are and which protocol they are spoken to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import urlsplit

from audioldm2_client._proxy import Proxy

Scheme = Literal["grpc", "grpcs", "http", "https"]

_PROTOCOL_NAMES = {"grpc": "gRPC", "http": "HTTP"}
_USUAL_PORTS = {"grpc": 8001, "http": 8000}
_SCHEMES: "dict[str, tuple[Literal['grpc', 'http'], bool]]" = {
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}

# What follows a base path in the URLs of Triton's endpoints.
_TRITONS_PATH = re.compile(r"^(.*?)/+v2/*(?:/(?:models|health|repository)\b.*)?$")


@dataclass(frozen=True)
class ServerAddress:
    """A parsed server URL.

    Attributes:
        protocol: what is spoken.
        target: "host:port", for HTTP with an optional base path.
        secure: whether it is spoken over TLS.
        proxy: what leads there; it is no part of what tells one server from another.
    """

    protocol: Literal["grpc", "http"]
    target: str
    secure: bool = False
    proxy: Proxy | None = field(default=None, compare=False)

    @property
    def host(self) -> str:
        """The host's name or address, without brackets."""
        return urlsplit(f"//{self.target}").hostname or ""

    @property
    def port(self) -> int:
        """The port."""
        return urlsplit(f"//{self.target}").port or 0

    @property
    def scheme(self) -> Scheme:
        """What a URL of the address begins with."""
        if self.protocol == "grpc":
            return "grpcs" if self.secure else "grpc"
        return "https" if self.secure else "http"

    @property
    def protocol_name(self) -> str:
        """The protocol as it is written in sentences."""
        return _PROTOCOL_NAMES[self.protocol]

    @property
    def usual_port(self) -> int:
        """Triton's default port for the protocol."""
        return _USUAL_PORTS[self.protocol]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}"


def parse_urls(urls: str | Sequence[str], *, with_tls_options: bool = False) -> tuple[ServerAddress, ...]:
    """Parse one URL or several.

    Raises:
        TypeError: something else than text.
        ValueError: no URL at all, one that is named twice, two protocols, or as `parse_url`.
    """
    listed = (urls,) if isinstance(urls, str) else tuple(urls)
    addresses = tuple(parse_url(url, with_tls_options=with_tls_options) for url in listed)
    if not addresses:
        raise ValueError("url must name at least one server; got an empty sequence")
    if len(set(addresses)) < len(addresses):
        raise ValueError(f"url must name every server once; got {', '.join(map(str, addresses))}")
    if len({address.protocol for address in addresses}) > 1:
        raise ValueError(f"url must name servers of one protocol; got {', '.join(map(str, addresses))}")
    return addresses


def parse_url(url: str, *, with_tls_options: bool = False) -> ServerAddress:
    """Parse "host:port" (gRPC), "grpc://host:port" or "http://host:port[/base-path]"; grpcs and https mean TLS.

    Args:
        url: the URL.
        with_tls_options: whether TLS options were given. Then "host:port" means TLS, and an unencrypted URL is refused.

    Raises:
        TypeError: something else than text.
        ValueError: another scheme, no host or port, or more than a base path.
    """
    if not isinstance(url, str):
        raise TypeError(f"url must be a str or a sequence of str; got {type(url).__name__}")
    parts = urlsplit(url if "://" in url else f"{'grpcs' if with_tls_options else 'grpc'}://{url}")
    if parts.scheme not in _SCHEMES:
        raise ValueError(
            f"url must start with grpc://, grpcs://, http:// or https://, or be host:port for gRPC; got {_shown(url)}"
        )
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"url has a bad port: {_shown(url)}") from error
    protocol, secure = _SCHEMES[parts.scheme]
    _check_parts(url, has_path=bool(parts.path.strip("/")), protocol=protocol)
    if before := _TRITONS_PATH.match(parts.path):
        raise ValueError(
            f"url must end before /v2, which is added here: {url[: -len(parts.path)]}{before[1]}; got {_shown(url)}"
        )
    if not parts.hostname or port is None:
        raise ValueError(f"url must name a host and a port, such as localhost:8001; got {_shown(url)}")
    if with_tls_options and not secure:
        raise ValueError(f"url must start with {parts.scheme}s:// where TLS options are given; got {_shown(url)}")
    return ServerAddress(protocol, parts.netloc + parts.path.rstrip("/"), secure)


def _check_parts(url: str, *, has_path: bool, protocol: str) -> None:
    if any(mark in url for mark in "@?#") or (protocol == "grpc" and has_path):
        raise ValueError(f"url must be no more than a host and a port, such as localhost:8001; got {_shown(url)}")


def _shown(url: str) -> str:
    """The URL for a message, without a password in it."""
    scheme, separator, rest = url.rpartition("://")
    user, at, place = rest.rpartition("@")
    return repr(f"{scheme}{separator}...@{place}" if ":" in user else f"{scheme}{separator}{user}{at}{place}")
