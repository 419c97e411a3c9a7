"""Whether a server is reached through a proxy: the usual variables of the environment, alike for gRPC and HTTP.

`http_proxy` holds for grpc:// and http://, `https_proxy` for grpcs:// and https://, `all_proxy` for both; `no_proxy`
lists exceptions. This machine itself is never reached through a proxy.
"""

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Proxy:
    """A proxy, and the variable that names it.

    Attributes:
        url: "http://[user:password@]host:port".
        variable: such as "http_proxy".
    """

    url: str
    variable: str

    def __str__(self) -> str:
        return f"the proxy {without_password(self.url)} of the variable {self.variable}"

    def __repr__(self) -> str:
        return f"Proxy({str(self)!r})"


def without_password(url: str) -> str:
    """Return a URL for a message."""
    scheme, separator, rest = url.rpartition("://")
    return f"{scheme}{separator}{'...@' if '@' in rest else ''}{rest.rpartition('@')[2]}"


def find_proxy(host: str, port: int, *, secure: bool, environment: Mapping[str, str] = os.environ) -> Proxy | None:
    """Return the proxy that leads to a server; None for none.

    Raises:
        ValueError: the variable names something else than an http:// proxy.
    """
    if _is_loopback(host) or _is_listed(host, port, _get(environment, "no_proxy")[1]):
        return None
    for name in ("https_proxy" if secure else "http_proxy", "all_proxy"):
        variable, url = _get(environment, name)
        if url:
            return Proxy(_checked(url, variable), variable)
    return None


def _get(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    """Return the name that a variable has, in small or in capital letters, and its value."""
    return next(
        ((n, environment[n].strip()) for n in (name, name.upper()) if environment.get(n, "").strip()), (name, "")
    )


def _checked(url: str, variable: str) -> str:
    parts = urlsplit(url if "://" in url else f"http://{url}")
    try:
        usable = parts.scheme == "http" and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ValueError(
            f"{variable} must name a proxy as http://host:port, for gRPC and HTTP alike; "
            f"got {without_password(url)!r}; change it, or list the server's host in no_proxy"
        )
    return f"http://{parts.netloc}{'' if parts.port else ':80'}"


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_loopback(host: str) -> bool:
    address = _address(host)
    if address is None:
        return host.rstrip(".").lower() == "localhost" or host.rstrip(".").lower().endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _is_listed(host: str, port: int, no_proxy: str) -> bool:
    return any(_matches(entry.strip().lower(), host.rstrip(".").lower(), port) for entry in no_proxy.split(","))


def _matches(entry: str, host: str, port: int) -> bool:
    """Whether an entry of `no_proxy` is meant: *, a domain, an address, or a network such as 10.0.0.0/8."""
    if entry == "*":
        return True
    address = _address(host)
    if address is not None and "/" in entry:
        try:
            return address in ipaddress.ip_network(entry, strict=False)
        except ValueError:
            return False
    name = entry.removesuffix(f":{port}").removeprefix("*").removeprefix(".").strip("[]")
    return bool(name) and (host == name or (address is None and host.endswith(f".{name}")))
