"""Asks an HTTP endpoint on this machine whether it answers."""

import http.client
import socket
from http import HTTPStatus

TIMEOUT_S = 2.0


class _UnixConnection(http.client.HTTPConnection):
    """A connection through a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connect."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def answers(endpoint: str, path: str) -> bool:
    """Say whether `GET path` is answered with 200.

    Args:
        endpoint: `HOST:PORT` or `unix:PATH`.
        path: Of the resource.
    """
    connection = _connection(endpoint)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _connection(endpoint: str) -> http.client.HTTPConnection:
    if endpoint.startswith("unix:"):
        return _UnixConnection(endpoint.removeprefix("unix:"), TIMEOUT_S)
    host, _, port = endpoint.rpartition(":")
    return http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
