"""A collector of OpenTelemetry's: it takes spans over HTTP, as protobuf and as JSON, and keeps them."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2  # comes with xds-protos

_REQUEST: Any = getattr(trace_service_pb2, "ExportTraceServiceRequest")  # noqa: B009 - made when it is imported


@dataclass(frozen=True)
class Span:
    """What the tests look at."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    attributes: dict[str, str]


@dataclass
class OtlpReceiver:
    """What has come: all spans, all bodies, and the headers of each message."""

    url: str
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def trace(self, trace_id: str) -> dict[str, Span]:
        """Return the spans of a trace by their names, the last of each."""
        return {span.name: span for span in self.spans if span.trace_id == trace_id}

    def take(self, headers: dict[str, str], body: bytes) -> None:
        self.headers.append(headers)
        self.bodies.append(body)
        self.spans += _from_json(body) if headers["content-type"] == "application/json" else _from_protobuf(body)


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """Receive on loopback until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.receiver = OtlpReceiver(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.receiver  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.receiver.take({":path": self.path, **headers}, self._body(headers))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _body(self, headers: dict[str, str]) -> bytes:
        if "content-length" in headers:
            return self.rfile.read(int(headers["content-length"]))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: Any) -> None:
        pass


def _from_protobuf(body: bytes) -> list[Span]:
    message = _REQUEST.FromString(body)
    return [
        Span(
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.name,
            next(a.value.string_value for a in resource.resource.attributes if a.key == "service.name"),
            {attribute.key: attribute.value.string_value for attribute in span.attributes},
        )
        for resource in message.resource_spans
        for scope in resource.instrumentation_library_spans  # as scope_spans was called
        for span in scope.spans
    ]


def _from_json(body: bytes) -> list[Span]:
    def text_of(attribute: dict[str, Any]) -> str:
        return str(next(iter(attribute["value"].values())))

    return [
        Span(
            span["traceId"],
            span["spanId"],
            span.get("parentSpanId", ""),
            span["name"],
            next(text_of(a) for a in resource["resource"]["attributes"] if a["key"] == "service.name"),
            {attribute["key"]: text_of(attribute) for attribute in span.get("attributes", [])},
        )
        for resource in json.loads(body)["resourceSpans"]
        for scope in resource["scopeSpans"]
        for span in scope["spans"]
    ]
