"""What a port speaks, found out by asking it: for the sentence after a connection on which nobody understood us."""

import contextlib
import socket

from audioldm2_client._url import Scheme, ServerAddress

PROBE_TIMEOUT_S = 1.0

_HTTP2_SETTINGS = 4
_HTTP2_START = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0))
_HTTP1_REQUEST = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def probe_port(address: ServerAddress) -> Scheme | None:
    """Return the scheme of what is spoken at an address; None where that can't be told.

    This takes some milliseconds; up to 3 s at a port that accepts connections and says nothing.
    """
    if address.proxy is not None:
        return None
    plain = (_answer_to_http2, _answer_to_http)  # most servers of HTTP/1 answer HTTP/2, too
    asking = (_answer_to_tls, *plain) if address.secure else (*plain, _answer_to_tls)
    try:
        return next(filter(None, (ask(address) for ask in asking)), None)
    except OSError:
        return None


def _answer_to_http(address: ServerAddress) -> Scheme | None:
    return _answer(address, _HTTP1_REQUEST)


def _answer_to_http2(address: ServerAddress) -> Scheme | None:
    return _answer(address, _HTTP2_START)


def _answer(address: ServerAddress, words: bytes) -> Scheme | None:
    with _connected(address) as connection:
        connection.sendall(words)
        start = b""
        with contextlib.suppress(OSError):
            start = connection.recv(64)
    if start.startswith(b"HTTP/1."):
        return "http"
    # HTTP/2, and so gRPC: a frame begins with its length, three bytes, and its type.
    return "grpc" if len(start) >= 9 and start[0] == 0 and start[3] == _HTTP2_SETTINGS else None


def _answer_to_tls(address: ServerAddress) -> Scheme | None:
    import ssl  # takes 10 ms

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # nothing is sent over it: it needn't be trusted
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    with _connected(address) as connection:
        try:
            with context.wrap_socket(connection, server_hostname=address.host) as wrapped:
                speaks_http2 = wrapped.selected_alpn_protocol() == "h2"
        except (ssl.SSLError, ConnectionError, TimeoutError):
            return None
    # Many servers have HTTP/1.1 beside HTTP/2.
    return "grpcs" if speaks_http2 and address.protocol == "grpc" else "https"


def _connected(address: ServerAddress) -> socket.socket:
    return socket.create_connection((address.host, address.port), PROBE_TIMEOUT_S)
