"""W3C trace context and OpenTelemetry's spans, with the real SDK, over gRPC and HTTP, blocking and under asyncio."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
import pytest
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client, AudioLDM2Error, RequestCancelledError
from audioldm2_client._tracing import NO_PARENT, read_parent
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.helpers.gateways import Answering
from tests.helpers.waiting import wait_until

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
SECRET = "a dog named Rex"  # noqa: S105 - a prompt that no span may show


@pytest.fixture(scope="session")
def exporting() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporting: InMemorySpanExporter) -> Callable[[], list[ReadableSpan]]:
    """Gives the finished spans of this test."""
    exporting.clear()
    return lambda: list(exporting.get_finished_spans())


def generate_blocking(url: str, prompt: str = SECRET, **options):
    with AudioLDM2Client(url, max_retries=0) as client:
        return client.generate(prompt, **options)


def generate_asyncio(url: str, prompt: str = SECRET, **options):
    async def generate():
        async with AsyncAudioLDM2Client(url, max_retries=0) as client:
            return await client.generate(prompt, **options)

    return asyncio.run(generate())


@pytest.fixture(params=[generate_blocking, generate_asyncio])
def generate(request) -> Callable:
    return request.param


class Recording(grpc.GenericRpcHandler):
    """Keeps the metadata of every call, and refuses it."""

    def __init__(self) -> None:
        self.arrived: list[dict[str, str]] = []

    def service(self, details):
        self.arrived.append(dict(details.invocation_metadata))
        return grpc.unary_unary_rpc_method_handler(
            lambda _, context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "[INVALID_ARG] no")
        )


@pytest.fixture
def recorder(protocol: str) -> Iterator[tuple[str, Callable[[], dict[str, str]]]]:
    """The URL of a server that refuses everything, and what headers have arrived there with the last request."""
    if protocol == "http":
        with Answering(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 2\r\n\r\n{}") as server:

            def headers() -> dict[str, str]:
                lines = server.arrived[-1].partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
                return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}

            yield f"http://127.0.0.1:{server.port}", headers
        return
    handler = Recording()
    server = grpc.server(futures.ThreadPoolExecutor(2), handlers=[handler])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"grpc://127.0.0.1:{port}", lambda: handler.arrived[-1]
    server.stop(None).wait()


def test_span_tells_what_was_generated_and_never_the_prompt(url, generate, spans):
    result = generate(url, negative_prompt=SECRET, num_inference_steps=2, seed=7, request_id="r-1")
    (span,) = spans()
    assert (span.name, span.kind, span.status.status_code) == ("audioldm2.generate", SpanKind.CLIENT, StatusCode.UNSET)
    assert dict(span.attributes) == {
        "audioldm2.request_id": "r-1",
        "audioldm2.model": "audioldm2",
        "audioldm2.prompts": 1,
        "audioldm2.num_inference_steps": 2,
        "audioldm2.audio_length_in_s": 1.0,
        "audioldm2.outcome": "done",
    }
    assert result.request_id == "r-1"
    assert "Rex" not in span.to_json()


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        (f"fail INVALID_ARG [INVALID_ARG] {SECRET}", "InvalidRequestError"),
        (f"fail UNAVAILABLE {SECRET}", "ServerBusyError"),
        (f"raise {SECRET}", "ServerFaultError"),
    ],
)
def test_failure_is_named_without_its_words(url, generate, spans, prompt, name):
    with pytest.raises(AudioLDM2Error, match="Rex"):
        generate(url, prompt)
    (span,) = spans()
    assert (span.attributes["audioldm2.outcome"], span.attributes["error.type"]) == (name, name)
    assert span.status.status_code is StatusCode.ERROR
    assert "Rex" not in span.to_json()


def test_cancelled_generation_is_no_error(url, spans):
    with AudioLDM2Client(url) as client:
        generation = client.submit(SECRET, num_inference_steps=1000)
        wait_until(lambda: generation.progress().state == "denoising", 20, "denoising begins")
        generation.cancel()
        with pytest.raises(RequestCancelledError):
            generation.result()
    (span,) = spans()
    assert (span.attributes["audioldm2.outcome"], span.status.status_code) == (
        "RequestCancelledError",
        StatusCode.UNSET,
    )


def test_cancelled_task_is_no_error(url, spans):
    async def test() -> None:
        async with AsyncAudioLDM2Client(url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.generate(SECRET, num_inference_steps=1000), 0.5)

    asyncio.run(test())
    (span,) = spans()
    assert span.status.status_code is StatusCode.UNSET


def test_span_is_a_child_of_the_callers_and_the_server_gets_it(recorder, generate, spans):
    url, headers = recorder
    with trace.get_tracer("test").start_as_current_span("caller") as caller, pytest.raises(AudioLDM2Error):
        generate(url)
    ours, _ = spans()
    assert ours.parent.span_id == caller.get_span_context().span_id
    context = ours.get_span_context()
    assert headers()["traceparent"] == f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def test_named_parent_goes_before_the_current_span(recorder, generate, spans):
    url, headers = recorder
    with trace.get_tracer("test").start_as_current_span("caller"), pytest.raises(AudioLDM2Error):
        generate(url, traceparent=TRACEPARENT, tracestate="vendor=1")
    ours, _ = spans()
    context = ours.get_span_context()
    assert (context.trace_id, ours.parent.span_id) == (int(TRACE, 16), int(PARENT, 16))
    assert headers()["traceparent"] == f"00-{TRACE}-{context.span_id:016x}-{context.trace_flags:02x}"
    assert headers()["tracestate"] == "vendor=1"


def test_span_is_current_while_the_connection_is_made(url, spans, monkeypatch):
    """Instrumented connections would begin traces of their own otherwise, and send those."""
    from audioldm2_client import _transport

    seen = []
    for transport in (_transport.GrpcTransport, _transport.HttpTransport):

        def infer(self, *arguments, infer=transport.infer):
            seen.append(trace.get_current_span().get_span_context())
            return infer(self, *arguments)

        monkeypatch.setattr(transport, "infer", infer)
    generate_blocking(url)
    (span,) = spans()
    assert seen == [span.get_span_context()]
    assert not trace.get_current_span().get_span_context().is_valid


WITHOUT = """
import sys
from audioldm2_client import AudioLDM2Client, AudioLDM2Error
with AudioLDM2Client(sys.argv[1], max_retries=0, headers={"traceparent": "of-the-client"}) as client:
    try:
        client.generate("a dog", traceparent=sys.argv[2], tracestate=sys.argv[3])
    except AudioLDM2Error:
        pass
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""


def test_without_opentelemetry_the_callers_context_is_passed_on_as_it_is(recorder):
    url, headers = recorder
    command = [sys.executable, "-W", "error", "-c", WITHOUT, url, TRACEPARENT, "vendor=1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert (headers()["traceparent"], headers()["tracestate"]) == (TRACEPARENT, "vendor=1")


def test_command_line_takes_it_from_the_environment(recorder, tmp_path):
    url, headers = recorder
    command = [sys.executable, "-m", "audioldm2_client", "x", "-o", str(tmp_path / "x.wav"), "--url", url]
    environment = {**os.environ, "TRACEPARENT": TRACEPARENT, "TRACESTATE": "vendor=1"}
    done = subprocess.run(command, timeout=60, env=environment)
    assert done.returncode != 0  # the server refuses everything
    assert (headers()["traceparent"], headers()["tracestate"]) == (TRACEPARENT, "vendor=1")


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        "x",
        TRACEPARENT.upper(),
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"{TRACEPARENT}-more",
        f"{TRACEPARENT}\n",
        f" {TRACEPARENT}",
        f"01-{TRACE}-{PARENT}-01-ü",
        None,
    ],
)
def test_context_that_is_not_valid_is_ignored_as_the_standard_asks(traceparent):
    assert not read_parent(traceparent, "vendor=1").headers.get("traceparent")
    assert NO_PARENT.headers == {}


def test_context_of_a_later_version_is_passed_on():
    later = f"01-{TRACE}-{PARENT}-01-more"
    assert read_parent(later, None).headers == {"traceparent": later}
    assert read_parent(TRACEPARENT, "a=1\nb=2").headers == {"traceparent": TRACEPARENT}
    with pytest.raises(TypeError, match="traceparent must be a str; got bytes"):
        read_parent(TRACEPARENT.encode(), None)  # type: ignore[arg-type]
