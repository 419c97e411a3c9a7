"""Traces and the request log of `python -m server`: from a caller's `traceparent` to the last stage."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import tritonclient.grpc

from server import ServerError
from server.front.envoy import Endpoints, configuration, find_envoy
from server.tracing import Tracing, read_tracing
from tests.helpers import tiny_repository as tiny
from tests.helpers.otlp_receiver import OtlpReceiver, otlp_receiver
from tests.helpers.waiting import wait_until

TIMEOUT_S = 60
PROMPT = "a dog that nobody may read of"
STAGES = {"tokenizer", "text_encoder", "gpt2", "unet", "vae", "vocoder", "postprocess"}
CALLER = "b7ad6b7169203331"
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318"}


@dataclass
class Served:
    """A `python -m server`: its addresses, and what it has said so far."""

    http: str = ""
    grpc: str = ""
    said: list[str] = field(default_factory=list)

    def requests(self, request_id: str) -> list[dict[str, object]]:
        return [line for line in map(json.loads, self.said) if line.get("id") == request_id]


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def served(exported_repository, collector, tmp_path_factory) -> Iterator[Served]:
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-key=a%20key",
        "OTEL_SERVICE_NAME": "sounds",
    }
    stderr = tmp_path_factory.mktemp("traced") / "stderr"
    with stderr.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "server", f"--model-repository={exported_repository}", "--log-format=json", *ports],
            cwd=tiny.ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    server = Served()
    words = process.stdout.readline().split()
    assert words[:1] == ["Ready:"], stderr.read_text()
    server.http, server.grpc = words[1], words[2].removeprefix("grpc://")
    reader = threading.Thread(target=lambda: server.said.extend(iter(process.stdout.readline, "")))
    reader.start()
    try:
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT_S) == 0, stderr.read_text()
        reader.join()
        process.stdout.close()
    assert PROMPT not in "".join(server.said)
    assert PROMPT.encode() not in b"".join(collector.bodies)


def traceparent(trace_id: str) -> str:
    return f"00-{trace_id}-{CALLER}-01"


def generate_over_http(server: Served, trace_id: str, request_id: str, **fields: object) -> None:
    body = {"id": request_id, "prompt": PROMPT, "num_inference_steps": 1, "audio_length_in_s": 0.04, **fields}
    request = urllib.request.Request(  # noqa: S310
        f"{server.http}/v2/models/audioldm2/generate",
        json.dumps(body).encode(),
        {"traceparent": traceparent(trace_id)},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
        answer.read()


def generate_over_grpc(server: Served, trace_id: str, request_id: str) -> None:
    inputs = []
    for name, kind, value in (
        ("prompt", "BYTES", np.array([PROMPT.encode()], np.object_)),
        ("num_inference_steps", "INT32", np.array([1], np.int32)),
        ("audio_length_in_s", "FP32", np.array([0.04], np.float32)),
    ):
        inputs.append(tritonclient.grpc.InferInput(name, [1], kind))
        inputs[-1].set_data_from_numpy(value)
    with tritonclient.grpc.InferenceServerClient(server.grpc) as client:
        client.infer("audioldm2", inputs, request_id=request_id, headers={"traceparent": traceparent(trace_id)})


def complete_trace(served: Served, collector: OtlpReceiver, generate: Callable[..., None], names: set[str]) -> str:
    """Generate until a trace has all spans, and return its id: Triton's exporter doesn't send again what was lost."""
    missing = []
    for first in "123cd" if generate is generate_over_http else "6789a":
        trace_id = first * 32
        generate(served, trace_id, f"traced {first}")
        with contextlib.suppress(AssertionError):
            wait_until(lambda trace_id=trace_id: names <= set(collector.trace(trace_id)), TIMEOUT_S / 4, "all spans")
            return trace_id
        missing.append(sorted(names - set(collector.trace(trace_id))))
    raise AssertionError(f"missing in each trace: {missing}")


@pytest.mark.parametrize("generate", [generate_over_http, generate_over_grpc])
def test_a_callers_trace_goes_through_the_front_to_every_stage(served, collector, generate):
    names = {"ingress", "InferRequest", "audioldm2", *STAGES}
    trace_id = complete_trace(served, collector, generate, names)
    spans = collector.trace(trace_id)
    assert spans["ingress"].parent_id == CALLER
    assert spans["InferRequest"].parent_id == spans["ingress"].span_id
    assert spans["audioldm2"].parent_id == spans["InferRequest"].span_id
    assert {spans[stage].parent_id for stage in STAGES} == {spans["audioldm2"].span_id}
    assert spans["ingress"].attributes["request_id"] == f"traced {trace_id[0]}"
    assert {spans[stage].attributes["triton.request_id"] for stage in STAGES} == {f"traced {trace_id[0]}"}
    assert {spans[name].service for name in names} == {"sounds"}
    assert {(headers[":path"], headers["x-key"]) for headers in collector.headers} == {("/v1/traces", "a key")}


def test_a_refusal_has_a_span_of_the_front_alone(served, collector):
    request = urllib.request.Request(  # noqa: S310
        f"{served.http}/v2/models/unet/infer", b"{}", {"traceparent": traceparent("b" * 32), "x-request-id": "closed"}
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    refusal.value.close()
    wait_until(lambda: "ingress" in collector.trace("b" * 32), TIMEOUT_S, "the span")
    span = collector.trace("b" * 32)["ingress"]
    assert (span.attributes["http.status_code"], span.attributes["request_id"]) == ("404", "closed")
    assert "InferRequest" not in collector.trace("b" * 32)


def test_a_request_has_one_line_of_json_on_standard_output(served):
    generate_over_http(served, "4" * 32, 'a "logged" one')
    wait_until(lambda: served.requests('a "logged" one'), TIMEOUT_S, "its line")
    [line] = served.requests('a "logged" one')
    assert list(line)[:4] == ["time", "event", "id", "ticket"]
    assert (line["event"], line["outcome"], line["reason"], line["steps"]) == ("request", "finished", "ok", 1)


def test_a_refusal_of_a_stage_and_one_of_the_front_have_one_line_each(served):
    for request_id, steps in (("by a stage", 0), ("by the front", [0])):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            generate_over_http(served, "5" * 32, request_id, num_inference_steps=steps, prompt="" if steps else PROMPT)
        refusal.value.close()
        wait_until(lambda request_id=request_id: served.requests(request_id), TIMEOUT_S, "its line")
        [line] = served.requests(request_id)
        assert (line["outcome"], line["reason"]) == ("refused", "INVALID_ARG")


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        (ENDPOINT, "http://localhost:4318/v1/traces"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "https://collector/base/"}, "https://collector/base/v1/traces"),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://other:1/t"}, "http://other:1/t"),
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "http://localhost:4318/v1/traces"),
    ],
)
def test_the_standard_variables_tell_where_spans_go(environment, url):
    tracing = read_tracing(environment)
    assert tracing is not None
    assert tracing.url == url


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {**ENDPOINT, "OTEL_SDK_DISABLED": "true"},
        {**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_nothing_is_traced(environment):
    assert read_tracing(environment) is None


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, r"must be http/protobuf, got 'grpc': .* 4318"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "localhost:4318"}, "must be a URL such as http://localhost:4318, got 'local"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://"}, "must be a URL"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:99999"}, "must be a URL"),
    ],
)
def test_wrong_settings_are_refused_in_a_sentence(environment, sentence):
    with pytest.raises(ServerError, match=sentence):
        read_tracing(environment)


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:4318/v1/traces", "https://collector.example/v1/traces"])
def test_envoy_takes_its_configuration_with_and_without_a_collector(tmp_path, url):
    names = ("http", "grpc", "metrics", "triton_http", "triton_grpc", "triton_metrics", "door", "door_metrics", "admin")
    endpoints = Endpoints(**{name: f"unix:{tmp_path}/{name}" for name in names})
    tracing = Tracing(url, headers={"x-key": 'with "quotes", $signs and 100 %'}) if url else None
    (tmp_path / "envoy.yaml").write_text(configuration(endpoints, tracing))
    command = [find_envoy(), "--mode", "validate", "--config-path", tmp_path / "envoy.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr[-2000:]
