"""What every connection has in common: time limits, signs of life, proxies, TLS. Pure.

A server is silent for as long as it works. So that a connection which was lost without a word (a NAT or a load balancer
forgets it, a machine loses its power) is noticed within seconds, and not forgotten for being quiet in the first place:

- The kernel probes quiet TCP connections, and gives up those whose peer doesn't acknowledge.
- Over gRPC the server is asked on the same connection whether it is alive. Each answer makes the next HTTP/2 ping
  legal: a server ends connections whose client sends several pings while it has nothing to send itself. gRPC sends a
  ping where nothing has arrived for a while, and gives up a connection on which it isn't answered.
- Over HTTP the model `jobs` is asked on another connection, see `_silence`.
"""

import math
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audioldm2_client._connection import ConnectionOptions, TlsOptions
from audioldm2_client._proxy import find_proxy
from audioldm2_client._url import ServerAddress

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT_S = 5.0
"""Time allowed for making a connection; part of the time allowed for the whole call."""

# gRPC fails calls while it waits before it connects again: at most so long, because the retries are made here.
RECONNECT_DELAY_MS = (100, 1000)

HEARTBEAT_S = 5.0
"""How often a server that works is asked for a sign of life."""

PING_AFTER_S = 10.0
"""How long nothing may arrive before the connection is probed; more than HEARTBEAT_S, after which something does."""

PING_TIMEOUT_S = 10.0
"""How long a probe may remain without an answer."""


def with_proxy(address: ServerAddress) -> ServerAddress:
    """Return the address with the proxy that leads there, if one does.

    Raises:
        ValueError: a proxy that can't be used, or gRPC in a program that gevent has patched.
    """
    if address.protocol == "grpc" and _is_patched_by_gevent():
        raise ValueError(
            "url must be an http:// or https:// one in a program that gevent has patched, because gRPC would stop all "
            f"of its greenlets while it waits; got {address}"
        )
    return replace(address, proxy=find_proxy(address.host, address.port, secure=address.secure))


def _is_patched_by_gevent() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading") or monkey.is_module_patched("socket"))


def socket_options() -> list[tuple[int, int, int]]:
    """Return the options of an HTTP connection's socket, as far as this system has them."""
    probes = 2
    wanted = {
        "TCP_KEEPIDLE": math.ceil(PING_AFTER_S),
        "TCP_KEEPALIVE": math.ceil(PING_AFTER_S),  # macOS' name for it
        "TCP_KEEPINTVL": math.ceil(PING_TIMEOUT_S / probes),
        "TCP_KEEPCNT": probes,
        "TCP_USER_TIMEOUT": int(1000 * (PING_AFTER_S + PING_TIMEOUT_S)),
    }
    there = [(socket.IPPROTO_TCP, getattr(socket, n), value) for n, value in wanted.items() if hasattr(socket, n)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), *there]


def channel_options(address: ServerAddress) -> list[tuple[str, Any]]:
    """Return the options of a gRPC channel."""
    first_delay_ms, longest_delay_ms = RECONNECT_DELAY_MS
    proxy = address.proxy
    return [
        # Unlimited (-1): 160 s of audio are 10 MB per waveform, gRPC's own limit is 4 MB.
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        # In spite of its name this is also the time allowed for one connection attempt.
        ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIMEOUT_S * 1000)),
        ("grpc.initial_reconnect_backoff_ms", first_delay_ms),
        ("grpc.max_reconnect_backoff_ms", longest_delay_ms),
        ("grpc.keepalive_time_ms", int(PING_AFTER_S * 1000)),
        ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
        # gRPC also measures the bandwidth with pings; while one of these is on its way, no other is sent.
        ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),
        # gRPC's own look at the environment would send even localhost to a proxy.
        ("grpc.http_proxy", proxy.url) if proxy is not None else ("grpc.enable_http_proxy", 0),
    ]


def read_channel_credentials(options: ConnectionOptions) -> dict[str, bytes | None]:
    """Return the arguments of `grpc.ssl_channel_credentials`.

    Raises:
        OSError: a file can't be read.
    """
    tls = options.tls or TlsOptions()
    files = {
        "root_certificates": tls.ca_file,
        "certificate_chain": tls.cert_file,
        "private_key": tls.key_file,
    }
    return {name: None if path is None else Path(path).read_bytes() for name, path in files.items()}


def http_client_arguments(address: ServerAddress, options: ConnectionOptions) -> dict[str, Any]:
    """Return the arguments of `httpx.Client` and `httpx.AsyncClient`, without their transport.

    Nothing is taken from the environment (`trust_env`): `.netrc` would add a password, and the proxy is known.
    Redirects aren't followed, because the headers would go there too. Answers aren't compressed: audio hardly shrinks.
    """
    return {
        "base_url": f"{'https' if address.secure else 'http'}://{address.target}",
        "headers": {"user-agent": "audioldm2-client", "accept-encoding": "identity", **options.headers},
        "trust_env": False,
        "follow_redirects": False,
    }


def http_transport_arguments(address: ServerAddress, options: ConnectionOptions) -> dict[str, Any]:
    """Return the arguments of `httpx.HTTPTransport` and `httpx.AsyncHTTPTransport`: a connection for each call."""
    import httpx

    return {
        "verify": make_ssl_context(options) if address.secure else False,
        "trust_env": False,
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=0),
        "proxy": address.proxy and httpx.Proxy(address.proxy.url),
        "socket_options": socket_options(),
    }


def http_timeouts(timeout_s: float) -> Any:
    """Return the limits of one HTTP call's parts; that of the whole is the transports' own."""
    import httpx

    return httpx.Timeout(None, connect=min(CONNECT_TIMEOUT_S, timeout_s))


def make_ssl_context(options: ConnectionOptions) -> "ssl.SSLContext":
    """Return what HTTP needs for TLS."""
    import ssl

    tls = options.tls or TlsOptions()
    context = ssl.create_default_context(cafile=tls.ca_file)
    if tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context
