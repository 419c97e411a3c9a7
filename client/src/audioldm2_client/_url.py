"""Where the server is and which protocol it is spoken to."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

_PROTOCOL_NAMES = {"grpc": "gRPC", "http": "HTTP"}
_USUAL_PORTS = {"grpc": 8001, "http": 8000}


@dataclass(frozen=True)
class ServerAddress:
    """A parsed server URL.

    Attributes:
        scheme: the protocol.
        target: "host:port", for HTTP with an optional base path: what tritonclient wants.
    """

    scheme: Literal["grpc", "http"]
    target: str

    @property
    def protocol_name(self) -> str:
        """The protocol as it is written in sentences."""
        return _PROTOCOL_NAMES[self.scheme]

    @property
    def usual_port(self) -> int:
        """Triton's default port for the protocol."""
        return _USUAL_PORTS[self.scheme]

    def __str__(self) -> str:
        return f"{self.scheme}://{self.target}"


def parse_url(url: str) -> ServerAddress:
    """Parse "host:port" (gRPC), "grpc://host:port" or "http://host:port[/base-path]".

    Raises:
        ValueError: another scheme, or no host or port.
    """
    parts = urlsplit(url if "://" in url else f"grpc://{url}")
    if parts.scheme not in ("grpc", "http"):
        raise ValueError(f"url must start with grpc:// or http://, or be host:port for gRPC; got {url!r}")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"url has a bad port: {url!r}") from error
    if not parts.hostname or port is None:
        raise ValueError(f"url must name a host and a port, such as localhost:8001; got {url!r}")
    if (
        parts.username is not None
        or parts.query
        or parts.fragment
        or (parts.scheme == "grpc" and parts.path.strip("/"))
    ):
        raise ValueError(f"url must be no more than a host and a port, such as localhost:8001; got {url!r}")
    path = parts.path.rstrip("/")
    return ServerAddress("http" if parts.scheme == "http" else "grpc", parts.netloc + path)
