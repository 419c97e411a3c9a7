"""A server that is restarted behind a front, and readiness: refusals that pass, over gRPC and HTTP."""

import asyncio
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client, DeadlineExceededError, ServerBusyError
from audioldm2_client._errors import error_from_answer, error_from_status
from audioldm2_client._flow import Infer, Route, Sleep, infer_flow
from audioldm2_client._request import build_request
from audioldm2_client._url import parse_urls

from tests.helpers.gateways import Answering, Relay

REQUEST = build_request("x", {}, model_name="audioldm2", request_id="r1", timeout_s=600)
(ADDRESS,) = parse_urls("localhost:8001")
DIED = "[UNAVAILABLE] stage unet died; the server restarts, send it again"


class HttpFront(Relay):
    """Answers 503 for a while, as a front does whose server restarts; then it passes everything on."""

    def __init__(self, target: str, down_s: float) -> None:
        self._end_s = time.monotonic() + down_s
        self.refused = 0
        super().__init__(target)

    def serve(self, near) -> None:
        if time.monotonic() >= self._end_s:
            super().serve(near)
            return
        self.refused += 1
        near.recv(65536)
        body = json.dumps({"error": DIED}).encode()
        near.sendall(b"HTTP/1.1 503 x\r\nRetry-After: 1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


class GrpcFront(grpc.GenericRpcHandler):
    """The same over gRPC."""

    def __init__(self, target: str, down_s: float) -> None:
        self._end_s = time.monotonic() + down_s
        self._channel = grpc.insecure_channel(target)
        self.refused = 0

    def service(self, details):
        def forward(message, context):
            if time.monotonic() < self._end_s:
                self.refused += 1
                context.set_trailing_metadata((("retry-after", "1"),))
                context.abort(grpc.StatusCode.UNAVAILABLE, DIED)
            return self._channel.unary_unary(details.method)(message)

        return grpc.unary_unary_rpc_method_handler(forward)


Front = HttpFront | GrpcFront


@pytest.fixture
def restart(protocol: str, toy_server) -> Iterator[Callable[[float], tuple[str, Front]]]:
    """Puts a front before the toy server that is down for some seconds from now on; gives its URL."""
    with contextlib.ExitStack() as ends:

        def restart(down_s: float) -> tuple[str, Front]:
            if protocol == "http":
                http = ends.enter_context(HttpFront(toy_server.http_url, down_s))
                return f"http://127.0.0.1:{http.port}", http
            front = GrpcFront(toy_server.grpc_url, down_s)
            server = grpc.server(futures.ThreadPoolExecutor(8), handlers=[front])
            port = server.add_insecure_port("127.0.0.1:0")
            server.start()
            ends.callback(lambda: server.stop(None).wait())
            return f"grpc://127.0.0.1:{port}", front

        yield restart


def test_library_rides_over_a_restart_with_enough_retries(restart):
    url, front = restart(2.0)
    with AudioLDM2Client(url, max_retries=8) as client:
        assert client.generate("a dog", seed=7).seed == 7
    assert front.refused > 1


def test_library_rides_over_a_restart_under_asyncio(restart):
    url, front = restart(2.0)

    async def generate() -> int:
        async with AsyncAudioLDM2Client(url, max_retries=8) as client:
            return (await client.generate("a dog", seed=7)).seed

    assert asyncio.run(generate()) == 7
    assert front.refused > 1


def test_refusal_of_a_restart_says_that_it_is_safe_to_send_again_and_when(restart):
    url, _ = restart(600)
    with AudioLDM2Client(url, max_retries=0) as client, pytest.raises(ServerBusyError) as caught:
        client.generate("a dog")
    assert str(caught.value) == DIED
    assert (caught.value.safe_to_retry, caught.value.retry_after_s) == (True, 1.0)


def test_batch_rides_over_a_restart(restart, tmp_path):
    url, front = restart(3.0)
    (tmp_path / "p.txt").write_text("a dog\na cat\na cow\n")
    options = ("--prompts", str(tmp_path / "p.txt"), "--output-dir", str(tmp_path / "out"), "--url", url)
    command = [sys.executable, "-m", "audioldm2_client", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("3 made, 0 already there, 0 failed\n")
    assert front.refused >= 3


def test_signal_while_the_library_waits_for_the_next_attempt_ends_it(tmp_path):
    """Of a server that asks for a minute."""
    answer = b"HTTP/1.1 503 x\r\nRetry-After: 60\r\nContent-Length: 0\r\n\r\n"
    with Answering(answer) as server:
        url = f"http://127.0.0.1:{server.port}"
        command = [sys.executable, "-m", "audioldm2_client", "x", "-o", str(tmp_path / "x.wav"), "--url", url]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            end = time.monotonic() + 20
            while not server.arrived:
                assert time.monotonic() < end
                time.sleep(0.02)
            os.kill(process.pid, signal.SIGTERM)
            assert process.communicate(timeout=10)[1] == "audioldm2: ended by SIGTERM\n"
    assert process.returncode == 143


def attempts_within(outage_s: float, max_retries: int, jitter: float, monkeypatch) -> bool:
    """Whether a generation survives an outage; `jitter` is where in its range each pause lies, 0 to 1."""
    monkeypatch.setattr("random.uniform", lambda low, high: low + jitter * (high - low))
    now = 0.0
    flow = infer_flow(REQUEST, Route((ADDRESS,)), max_retries, lambda: now)
    try:
        step = next(flow)
        while True:
            if isinstance(step, Sleep):
                now += step.seconds
                step = flow.send(None)
            elif isinstance(step, Infer) and now >= outage_s:
                return True
            else:
                step = flow.throw(ServerBusyError(DIED, safe_to_retry=True))
    except ServerBusyError:
        return False


@pytest.mark.parametrize(
    ("max_retries", "always_s", "at_most_s"), [(2, 0.375, 0.75), (5, 3.875, 7.75), (8, 15.875, 31.75)]
)
def test_outage_that_retries_ride_over_is_that_of_the_guide(max_retries, always_s, at_most_s, monkeypatch):
    assert attempts_within(always_s, max_retries, 0, monkeypatch)
    assert not attempts_within(always_s + 0.001, max_retries, 0, monkeypatch)
    assert attempts_within(at_most_s, max_retries, 1, monkeypatch)
    assert not attempts_within(at_most_s + 0.001, max_retries, 1, monkeypatch)
    guide = (Path(__file__).parents[2] / "docs/client.md").read_text()
    retries = "2, the default" if max_retries == 2 else max_retries
    assert f"| {retries} | {math.floor(always_s * 10) / 10} to {at_most_s:.1f} s |" in guide


@pytest.mark.parametrize(
    "words",
    [
        "[UNAVAILABLE] stage unet died",
        "[UNAVAILABLE] the server restarts: connection reset",
        "[UNAVAILABLE] socket closed",
    ],
)
def test_tagged_refusal_is_the_servers_whatever_its_words_are_and_whatever_carries_it(words):
    body = json.dumps({"error": f"in ensemble 'audioldm2', {words}"}).encode()
    errors = [error_from_answer(status, {}, body, REQUEST, ADDRESS) for status in (400, 500, 503)]
    errors.append(error_from_status("StatusCode.UNAVAILABLE", f"in ensemble 'audioldm2', {words}", REQUEST, ADDRESS))
    for error in errors:
        assert (type(error), error.safe_to_retry, str(error)) == (ServerBusyError, True, words)


class Health(grpc.GenericRpcHandler):
    """The health of a server and of its model, over gRPC."""

    def __init__(self, *, server: bool, model: bool) -> None:
        self._ready = {"ServerReady": server, "ModelReady": model}

    def service(self, details):
        ready = self._ready[details.method.rpartition("/")[2]]
        return grpc.unary_unary_rpc_method_handler(lambda *_: b"\x08\x01" if ready else b"")


@contextlib.contextmanager
def server_of(protocol: str, *, server: bool, model: bool) -> Iterator[str]:
    """Answers questions about readiness; gives its URL."""
    if protocol == "http":

        def answer(request: bytes) -> bytes:
            ready = server if request.startswith(b"GET /v2/health/ready ") else model
            return b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % (200 if ready else 400)

        with Answering(answer) as answering:
            yield f"http://127.0.0.1:{answering.port}"
        return
    answering = grpc.server(futures.ThreadPoolExecutor(2), handlers=[Health(server=server, model=model)])
    port = answering.add_insecure_port("127.0.0.1:0")
    answering.start()
    yield f"grpc://127.0.0.1:{port}"
    answering.stop(None).wait()


@pytest.mark.parametrize(("server", "model"), [(True, True), (False, True), (True, False), (False, False)])
def test_ready_is_what_server_and_ensemble_both_say(protocol, server, model):
    """Triton 2.70 with a dead stage: the server says no, and the ensemble yes."""

    async def ask(url: str) -> bool:
        async with AsyncAudioLDM2Client(url) as client:
            return await client.is_ready()

    with server_of(protocol, server=server, model=model) as url:
        with AudioLDM2Client(url) as client:
            assert client.is_ready() is (server and model)
            if not (server and model):
                with pytest.raises(DeadlineExceededError, match="wasn't ready"):
                    client.wait_until_ready(0.3)
        assert asyncio.run(ask(url)) is (server and model)
