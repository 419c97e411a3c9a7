"""The front before a real server: what is let through, what isn't, and what becomes of callers when things die."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer, ServerError
from tests.helpers import tiny_repository as tiny
from tests.helpers.waiting import wait_until

pytestmark = pytest.mark.server

SLOW = """
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        time.sleep(float(pb_utils.get_input_tensor_by_name(requests[0], "x").as_numpy()[0]))
        return [pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(r, "x")]) for r in requests]
"""
SLOW_CONFIG = """input { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "x" data_type: TYPE_FP32 dims: [ 1 ] }
"""
GOOD = json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]}).encode()
INFER = "/v2/models/quadruple/infer"


def write_repository(folder):
    """An ensemble `quadruple` over a stage `double`, an ensemble `nap` over a stage `slow`, and a job board."""
    tiny.add_double(folder)
    tiny.add_python_model(folder, "slow", SLOW, SLOW_CONFIG)
    floats = tiny.tensors("TYPE_FP32 dims: [ -1, 3 ]", "TYPE_FP32 dims: [ -1, 3 ]")
    tiny.add_chain(folder, "quadruple", floats, [("double", "x=x", "y=mid"), ("double", "x=mid", "y=y")])
    naps = tiny.tensors("TYPE_FP32 dims: [ 1 ]", "TYPE_FP32 dims: [ 1 ]")
    tiny.add_chain(folder, "nap", naps, [("slow", "x=x", "x=y")])
    shutil.copytree(tiny.ROOT / "model_repository" / "jobs", folder / "jobs")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> EmbeddedServer:
    with EmbeddedServer(write_repository(tmp_path_factory.mktemp("front")), stop_timeout_s=5) as running:
        yield running


@pytest.fixture
def grpc_client(server):
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        yield client


def ask(server, method, path, body=None, headers=(), timeout_s=30):
    connection = http.client.HTTPConnection(server.http_url, timeout=timeout_s)
    try:
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def nap(server, seconds, **fields):
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [seconds]}], **fields}
    return ask(server, "POST", "/v2/models/nap/infer", json.dumps(body), timeout_s=60)


def check_works(server):
    status, body, _ = ask(server, "POST", INFER, GOOD)
    assert status == 200, body
    assert json.loads(body)["outputs"][0]["data"] == [4, 8, 12]


def gzipped_zeros():
    squeeze = zlib.compressobj(wbits=31)
    return b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(256)) + squeeze.flush()


KILLERS = {
    "a shape of 2^40": (GOOD.replace(b"[1, 3]", b"[1099511627776]"), {}, 400),
    "a shape of 10^9": (GOOD.replace(b"[1, 3]", b"[1000000000]"), {}, 400),
    "256 MB of zeros, gzipped": (gzipped_zeros(), {"Content-Encoding": "gzip"}, 415),
    "60,000 brackets": (b'{"x":' + b"[" * 60_000 + b"]" * 60_000 + b"}", {}, 400),
    "a million brackets": (b'{"x":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", {}, 400),
    "3 MB": (b'{"x": "' + b"a" * 3_000_000 + b'"}', {}, 413),
    "a header length beyond the body": (GOOD, {"Inference-Header-Content-Length": "1000000"}, 400),
}


@pytest.mark.parametrize("name", KILLERS)
def test_a_request_that_would_end_triton_is_refused(server, name):
    body, headers, status = KILLERS[name]
    started = time.monotonic()
    answer = ask(server, "POST", INFER, body, headers)
    assert answer[0] == status
    assert json.loads(answer[1])["error"]
    assert time.monotonic() - started < 5
    check_works(server)


def test_a_body_in_a_hundred_thousand_chunks_is_one_to_triton(server):
    connection = http.client.HTTPConnection(server.http_url, timeout=60)
    padded = GOOD + b" " * 100_000
    connection.request("POST", INFER, (bytes([byte]) for byte in padded), encode_chunked=True)
    assert connection.getresponse().status == 200
    connection.close()


@pytest.mark.parametrize("model", ["double", "slow", "nothing"])
def test_stages_cannot_be_called(server, grpc_client, model):
    assert ask(server, "POST", f"/v2/models/{model}/infer", GOOD)[0] == 404
    x = tritonclient.grpc.InferInput("x", [1, 3], "FP32")
    x.set_data_from_numpy(np.ones((1, 3), np.float32))
    with pytest.raises(InferenceServerException, match=rf"unknown model: '{model}' is not found"):
        grpc_client.infer(model, [x])
    with pytest.raises(InferenceServerException, match="not found"):
        grpc_client.is_model_ready(model)


INTERNAL = {
    "repository index": lambda client: client.get_model_repository_index(),
    "unload": lambda client: client.unload_model("quadruple"),
    "load": lambda client: client.load_model("quadruple"),
    "statistics": lambda client: client.get_inference_statistics(),
    "configuration": lambda client: client.get_model_config("quadruple"),
    "trace": lambda client: client.update_trace_settings(settings={"trace_rate": "1"}),
    "logging": lambda client: client.update_log_settings({"log_verbose_level": 1}),
    "shared memory status": lambda client: client.get_system_shared_memory_status(),
    "shared memory": lambda client: client.register_system_shared_memory("a", "/triton_python_backend_shm", 8),
    "CUDA's shared memory": lambda client: client.get_cuda_shared_memory_status(),
}


@pytest.mark.parametrize("call", INTERNAL)
@pytest.mark.parametrize("protocol", [tritonclient.grpc, tritonclient.http])
def test_what_is_internal_cannot_be_reached(server, call, protocol):
    url = server.grpc_url if protocol is tritonclient.grpc else server.http_url
    with (
        protocol.InferenceServerClient(url) as client,
        pytest.raises(InferenceServerException, match=r"NOT_FOUND|not found"),
    ):
        INTERNAL[call](client)


def test_what_the_contract_names_is_reached(server, grpc_client):
    assert grpc_client.is_server_live()
    assert grpc_client.is_server_ready()
    assert grpc_client.is_model_ready("quadruple")
    assert grpc_client.get_model_metadata("quadruple").name == "quadruple"
    with tritonclient.http.InferenceServerClient(server.http_url) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("quadruple")
        assert client.get_model_metadata("quadruple")["name"] == "quadruple"


def test_binary_tensors_pass_both_ways(server):
    with tritonclient.http.InferenceServerClient(server.http_url) as client:
        x = tritonclient.http.InferInput("x", [1, 3], "FP32")
        x.set_data_from_numpy(np.array([[1, 2, 3]], np.float32), binary_data=True)
        assert client.infer("quadruple", [x]).as_numpy("y").tolist() == [[4, 8, 12]]


def test_a_compressed_grpc_message_is_refused_in_a_sentence(grpc_client):
    x = tritonclient.grpc.InferInput("x", [1000, 3], "FP32")  # a short one isn't compressed
    x.set_data_from_numpy(np.ones((1000, 3), np.float32))
    with pytest.raises(InferenceServerException, match="compressed messages aren't taken"):
        grpc_client.infer("quadruple", [x], compression_algorithm="gzip")


def test_a_large_grpc_message_is_refused(server, grpc_client):
    x = tritonclient.grpc.InferInput("x", [1_000_000, 3], "FP32")
    x.set_data_from_numpy(np.ones((1_000_000, 3), np.float32))
    with pytest.raises(InferenceServerException, match=r"(?i)too large"):
        grpc_client.infer("quadruple", [x])
    check_works(server)


def test_a_stream_is_refused(grpc_client):
    answers = []
    grpc_client.start_stream(lambda result, error: answers.append(error or result))
    wait_until(lambda: answers, 10, "the stream's answer")
    assert "streams" in str(answers[0])
    grpc_client.stop_stream()


@pytest.mark.parametrize("half", [b"GET /v2 HTTP/1.1\r\nHost: a\r\nX-", b""])
def test_connections_that_send_half_a_header_are_closed(server, half):
    connections = [socket.create_connection(server.http_url.split(":")) for _ in range(50)]
    if not half:  # a request that follows another on the same connection
        half = b"GET /v2 HTTP/1.1\r\nHost: a\r\n\r\nPOST /v2 HTTP/1.1\r\nHo"
    for connection in connections:
        connection.sendall(half)
        connection.settimeout(20)
    check_works(server)
    for connection in connections:
        while connection.recv(4096):
            pass
        connection.close()


def test_many_headers_are_refused(server):
    for headers in ([(f"x-{number}", "1") for number in range(200)], [("x-a", "a" * 100_000)]):
        # Envoy doesn't always say why it closes such a connection.
        with contextlib.suppress(http.client.RemoteDisconnected, ConnectionResetError):
            assert ask(server, "GET", "/v2", headers=headers)[0] == 431
    check_works(server)


def test_each_request_has_an_id(server):
    _, _, headers = nap(server, 0)
    assert len(headers["x-request-id"]) == 32
    _, body, headers = nap(server, 0, id="mine")
    assert headers["x-request-id"] == json.loads(body)["id"] == "mine"
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [0]}]}
    _, body, headers = ask(server, "POST", "/v2/models/nap/infer", json.dumps(body), {"X-Request-Id": "header's"})
    assert headers["x-request-id"] == json.loads(body)["id"] == "header's"
    _, _, headers = ask(server, "POST", "/v2/models/nap/infer", GOOD, {"X-Request-Id": "wrong"})
    assert headers["x-request-id"] == "wrong", "an error has it, too"


def test_a_timeout_is_kept_also_where_no_stage_looks_at_it(server):
    started = time.monotonic()
    status, body, _ = nap(server, 6, parameters={"timeout": 500_000})
    assert time.monotonic() - started < 4
    assert (status, json.loads(body)["error"][:10]) == (400, "[DEADLINE]")


def test_nobody_else_gets_in_while_a_server_with_internals_is_on_other_addresses(tmp_path):
    tiny.add_double(tmp_path)
    with pytest.raises(ServerError, match=r"--expose-internals .* loopback"):
        EmbeddedServer(tmp_path, host="0.0.0.0", expose_internals=True).start()  # noqa: S104


def test_exposed_internals_bear_the_same_messages(tmp_path):
    with EmbeddedServer(write_repository(tmp_path), expose_internals=True, stop_timeout_s=5) as server:
        assert ask(server, "POST", "/v2/models/double/infer", GOOD)[0] == 200
        assert ask(server, "POST", "/v2/repository/index", b"")[0] == 200
        deep = b'{"x":' + b"[" * 60_000 + b"]" * 60_000 + b"}"
        assert ask(server, "POST", "/v2/repository/index", deep)[0] == 400
        assert ask(server, "POST", "/v2/logging", deep)[0] == 400
        check_works(server)


def in_background(function, *arguments, **options):
    executor = concurrent.futures.ThreadPoolExecutor(1)
    future = executor.submit(function, *arguments, **options)
    executor.shutdown(wait=False)
    return future


def test_callers_are_told_when_tritonserver_dies_and_it_comes_back(tmp_path):
    events = []
    with EmbeddedServer(write_repository(tmp_path), stop_timeout_s=5, on_event=events.append) as server:
        victim, caller = server.pid, in_background(nap, server, 30)
        wait_until(lambda: in_flight(server) == 1, 10, "a request in flight")
        killed = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        status, body, headers = caller.result(timeout=10)
        assert time.monotonic() - killed < 2
        assert status == 503
        assert "[UNAVAILABLE]" in json.loads(body)["error"]
        assert int(headers["Retry-After"]) > 0
        wait_until(lambda: ask(server, "GET", "/v2/health/ready")[0] == 200, 15, "ready again")
        check_works(server)
        assert server.pid != victim
    assert events == ["tritonserver died (signal 9): see its log.", "The server is ready again."]
    assert not tiny.processes_of(tmp_path)


@pytest.mark.parametrize("victim", ["envoy", "door"])
def test_the_front_comes_back(tmp_path, victim):
    with EmbeddedServer(write_repository(tmp_path), stop_timeout_s=5) as server:
        pid = server.pid
        os.kill(front_pids(server)[victim], signal.SIGKILL)
        wait_until(lambda: works(server), 15, "the front is back")
        assert server.pid == pid, "Triton isn't started again for that"


def test_a_server_that_dies_too_often_ends_with_a_sentence(tmp_path):
    with EmbeddedServer(write_repository(tmp_path), stop_timeout_s=5, max_restarts=0) as server:
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServerError, match=r"tritonserver died \(signal 9\)"):
            server.wait()


def test_a_stop_waits_for_requests_and_refuses_new_ones(tmp_path):
    server = EmbeddedServer(write_repository(tmp_path), stop_timeout_s=20).start()
    caller = in_background(nap, server, 1)
    wait_until(lambda: in_flight(server) == 1, 10, "a request in flight")
    stop = in_background(server.stop)
    wait_until(lambda: ask(server, "GET", "/v2/health/ready")[0] == 503, 10, "no longer ready")
    status, body, _ = nap(server, 0)
    assert (status, json.loads(body)["error"]) == (503, "[UNAVAILABLE] the server stops.")
    assert caller.result(timeout=20)[0] == 200
    assert stop.result(timeout=20) == 0


def test_a_stop_answers_what_does_not_finish(tmp_path):
    server = EmbeddedServer(write_repository(tmp_path), stop_timeout_s=1).start()
    callers = [in_background(nap, server, 30) for _ in range(8)]
    wait_until(lambda: in_flight(server) == 8, 10, "requests in flight")
    started = time.monotonic()
    assert server.stop() == 8
    assert time.monotonic() - started < 15
    for caller in callers:
        status, body, _ = caller.result(timeout=5)
        assert (status, json.loads(body)["error"]) == (503, "[UNAVAILABLE] the server stops.")
    assert not tiny.processes_of(tmp_path)


def in_flight(server):
    connection = http.client.HTTPConnection(server.metrics_url, timeout=10)
    connection.request("GET", "/metrics/envoy")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    values = [line for line in lines if line.startswith("envoy_cluster_upstream_rq_active") and '"triton_http"' in line]
    return sum(int(line.rpartition(" ")[2]) for line in values)


def works(server):
    try:
        check_works(server)
    except (OSError, AssertionError, http.client.HTTPException):
        return False
    return True


def front_pids(server):
    door = server._front.pid  # tests alone need it
    (envoy,) = [int(pid) for pid in Path(f"/proc/{door}/task/{door}/children").read_text().split()]
    return {"door": door, "envoy": envoy}


def test_garbage_on_both_ports_harms_nobody(server):
    for url in (server.http_url, server.grpc_url):
        for garbage in (
            b"\0" * 1000,
            b"\x16\x03\x01" + b"a" * 500,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 500,
        ):
            with socket.create_connection(url.split(":")) as connection:
                connection.sendall(garbage)
                connection.settimeout(20)
                try:
                    while connection.recv(4096):
                        pass
                except ConnectionResetError:
                    pass
    check_works(server)


def test_an_oversized_grpc_frame_harms_nobody(server, grpc_client):
    with socket.create_connection(server.grpc_url.split(":")) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + struct.pack(">I", 0x00FFFFFF)[1:] + b"\0\0" + bytes(4))
        connection.settimeout(20)
        while connection.recv(4096):
            pass
    assert grpc_client.is_server_ready()
