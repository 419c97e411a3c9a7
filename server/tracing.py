"""Traces through OpenTelemetry, as the standard environment variables ask for them.

https://opentelemetry.io/docs/specs/otel/protocol/exporter/
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from server.errors import ServerError

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
HEADERS = "OTEL_EXPORTER_OTLP_HEADERS"
SERVICE_NAME = "OTEL_SERVICE_NAME"
DEFAULT_SERVICE_NAME = "audioldm2"
TRACES_PATH = "/v1/traces"


@dataclass(frozen=True)
class Tracing:
    """Where spans go.

    Attributes:
        url: Of OTLP over HTTP, with the path.
        service_name: What the spans are called by.
        headers: What is sent along, such as a key.
    """

    url: str
    service_name: str = DEFAULT_SERVICE_NAME
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "", parts.port or (443 if self.is_tls else 80)

    @property
    def is_tls(self) -> bool:
        """Whether the connection is encrypted."""
        return self.url.startswith("https:")

    @property
    def triton_arguments(self) -> list[str]:
        """Options that make tritonserver send spans: of each request, and of each stage of it, without tensors."""
        settings = (
            "mode=opentelemetry",
            "rate=1",
            "level=TIMESTAMPS",
            f"opentelemetry,url={self.url}",
            f"opentelemetry,resource=service.name={self.service_name}",
        )
        return [f"--trace-config={setting}" for setting in settings]

    @property
    def triton_environment(self) -> dict[str, str]:
        """What tritonserver's exporter reads: it takes values as they stand, and not as in URLs."""
        return {HEADERS: ",".join(f"{key}={value}" for key, value in self.headers.items())} if self.headers else {}


def read_tracing(environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """Return where spans go, None where no endpoint is configured, or where tracing is switched off.

    Raises:
        ServerError: An endpoint is no URL, or the protocol is another than OTLP over HTTP.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return None
    name = TRACES_ENDPOINT if environment.get(TRACES_ENDPOINT) else ENDPOINT
    if not (url := environment.get(name, "")):
        return None
    if (protocol := environment.get(PROTOCOL) or "http/protobuf") not in ("http/protobuf", "http/json"):
        raise ServerError(
            f"{PROTOCOL} must be http/protobuf, got {protocol!r}: Triton sends its spans over HTTP alone; name the "
            f"collector's HTTP port, usually 4318, in {name}."
        )
    _check_url(name, url)
    return Tracing(
        url=url if name == TRACES_ENDPOINT else url.rstrip("/") + TRACES_PATH,
        service_name=environment.get(SERVICE_NAME) or DEFAULT_SERVICE_NAME,
        headers=_read_headers(environment.get(HEADERS, "")),
    )


def _check_url(name: str, url: str) -> None:
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ServerError(f"{name} must be a URL such as http://localhost:4318, got {url!r}.")


def _read_headers(text: str) -> dict[str, str]:
    """Read `key=value,key=value`, with values as in URLs."""
    pairs = (pair.partition("=") for pair in text.split(",") if "=" in pair)
    return {key.strip().lower(): unquote(value.strip()) for key, _, value in pairs}
