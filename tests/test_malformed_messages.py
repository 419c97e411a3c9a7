"""Thousands of malformed messages, and floods, against a server with its defaults: all are refused, nothing suffers."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from server import EmbeddedServer
from tests.helpers import malformed_grpc as mg
from tests.helpers.malformed_http import http_messages
from tests.helpers.process_use import ProcessUse
from tests.helpers.waiting import wait_until

SEED = 7
NUM_HTTP, NUM_CALLS, NUM_FRAMES = 5000, 4000, 1000
MAX_GROWTH_MB = 300
"""Of tritonserver, each stub and the door, at any time."""
MAX_ENVOY_GROWTH_MB = 700
"""It holds what hasn't come to its end yet: 2 MB for each connection, for 30 s."""
SILENCE_S = (
    0.5  # a message that isn't complete gets no answer until the server's own limits, which have tests of theirs
)
THREADS = 24
RECOVERY_S = 15
GOOD = {"prompt": "rain", "num_inference_steps": 1, "audio_length_in_s": 0.64, "seed": 7}
SERVER_FAULTS = {"500", "502", "503", "504"}
GRPC_FAULTS = {"INTERNAL", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "DATA_LOSS"}


@pytest.fixture(scope="module")
def server(exported_repository) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(exported_repository) as running:
        yield running


@pytest.fixture(scope="module")
def reference(server):
    """What a good request gets before anything else; and all sizes of messages have been seen once."""
    exchange_all(server.http_url, http_messages(200, SEED + 1))
    call_all(server, mg.grpc_calls(200, SEED + 1))
    return generate(server)


@pytest.fixture(autouse=True)
def unharmed(server, reference):
    """After each test a good request gets the same samples, all processes are those from before, files are closed."""
    use = ProcessUse(server)
    files = use.num_files()
    with use.highest_growth() as growth:
        yield
        wait_until(lambda: is_accepted(server), RECOVERY_S, "a good request is taken")
        assert generate(server) == reference
    print(f"growth in MB: { {name: round(value) for name, value in growth.items()} }")
    assert ProcessUse(server).pids == use.pids
    assert growth.pop("envoy") < MAX_ENVOY_GROWTH_MB
    assert max(growth.values()) < MAX_GROWTH_MB
    wait_until(lambda: all(n <= files[name] + 4 for name, n in use.num_files().items()), 15, f"files closed: {files}")


def generate(server):
    request = urllib.request.Request(
        f"http://{server.http_url}/v2/models/audioldm2/generate", data=json.dumps(GOOD).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            return json.loads(response.read())["audio"]
    except urllib.error.HTTPError as error:
        pytest.fail(f"{error.code}: {error.read().decode()}")


def is_accepted(server):
    """Whether a small request is let in; Envoy refuses all for a while after others have filled its memory."""
    head = b"GET /v2/health/ready HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    return exchange(server.http_url, head, 5).startswith(b"HTTP/1.1 200")


def exchange(url, message, timeout_s=SILENCE_S):
    """Send bytes; return what comes back until the end, or until a silence."""
    answer = b""
    with socket.create_connection(url.split(":"), timeout=10) as connection, contextlib.suppress(OSError):
        connection.sendall(message)
        connection.settimeout(timeout_s)
        while block := connection.recv(65536):
            answer += block
    return answer


def exchange_all(url, messages):
    with ThreadPoolExecutor(THREADS) as executor:
        return list(executor.map(lambda message: exchange(url, message), messages))


def call_all(server, calls):
    """Make gRPC calls; return each one's status and words."""
    with grpc.insecure_channel(server.grpc_url) as channel, ThreadPoolExecutor(THREADS) as executor:

        def call(it):
            try:
                channel.unary_unary(it.method)(it.message, metadata=it.metadata, timeout=10)
            except grpc.RpcError as error:
                return error.code().name, error.details()
            return "OK", ""

        return list(executor.map(call, calls))


def test_malformed_http_requests_are_refused(server):
    answers = exchange_all(server.http_url, http_messages(NUM_HTTP, SEED))
    statuses = Counter(answer[9:12].decode() for answer in answers if answer.startswith(b"HTTP/1.1 "))
    print(statuses, len(answers) - statuses.total(), "without an answer")
    assert statuses["400"] > NUM_HTTP / 4
    assert len(statuses) > 5, "many kinds of faults were tried"
    assert statuses.total() > 0.75 * NUM_HTTP
    wrong = [answer[:300] for answer in answers if answer[9:12].decode("latin-1") in SERVER_FAULTS]
    assert wrong == []


def test_malformed_grpc_messages_are_refused(server):
    answers = call_all(server, mg.grpc_calls(NUM_CALLS, SEED))
    statuses = Counter(status for status, _ in answers)
    print(statuses)
    assert statuses["INVALID_ARGUMENT"] > NUM_CALLS / 4
    assert len(statuses) > 3, "many kinds of faults were tried"
    wrong = [answer for answer in answers if answer[0] in GRPC_FAULTS and "too large" not in answer[1]]
    assert wrong == []


def test_malformed_frames_harm_nothing(server):
    answers = exchange_all(server.grpc_url, mg.frame_sequences(NUM_FRAMES, SEED))
    assert sum(map(bool, answers)) > NUM_FRAMES / 4, "the others were cut off at once"
    assert sum(b"HTTP/1.1" in answer for answer in answers) == 0


OPENED = mg.frame(mg.HEADERS, mg.END_HEADERS, 1, mg.header_block(mg.call_headers()))
FLOODS = {
    "pings": lambda: mg.frame(mg.PING, 0, 0, bytes(8)) * 50_000,
    "settings": lambda: mg.frame(mg.SETTINGS, 0, 0, b"\0\4\0\0\0\1") * 50_000,
    "resets": lambda: b"".join(
        mg.frame(mg.HEADERS, mg.END_HEADERS, stream, mg.header_block(mg.call_headers()))
        + mg.frame(mg.RST_STREAM, 0, stream, b"\0\0\0\x08")
        for stream in range(1, 20_001, 2)
    ),
    "continuations": lambda: (
        mg.frame(mg.HEADERS, 0, 1, b"") + mg.frame(mg.CONTINUATION, 0, 1, mg.header_block([("a", "b" * 1000)])) * 5000
    ),
    "empty frames": lambda: OPENED + mg.frame(mg.DATA, 0, 1) * 100_000,
    "window updates": lambda: OPENED + mg.frame(mg.WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 100_000,
    "streams": lambda: b"".join(
        mg.frame(mg.HEADERS, mg.END_HEADERS, stream, mg.header_block(mg.call_headers()))
        for stream in range(1, 10_001, 2)
    ),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_floods_of_frames_harm_nothing(server, kind):
    flood = mg.PREFACE + mg.frame(mg.SETTINGS) + FLOODS[kind]()
    exchange_all(server.grpc_url, [flood] * 8)


BODYLESS = ("/v2/health/live", "/v2/health/ready", "/v2", "/v2/models/audioldm2/ready")


@pytest.mark.parametrize("framing", ["a length", "chunks"])
@pytest.mark.parametrize("path", BODYLESS)
def test_a_request_that_needs_no_body_has_none(server, path, framing):
    check_no_body_passes(server.http_url, path, framing, b"400")


@pytest.mark.parametrize("framing", ["a length", "chunks"])
@pytest.mark.parametrize("path", ["/metrics", "/metrics/envoy"])
def test_a_request_for_metrics_has_no_large_body(server, path, framing):
    check_no_body_passes(server.metrics_url, path, framing, b"413")


def check_no_body_passes(url, path, framing, status):
    sizes = {"a length": "Content-Length: 400000000", "chunks": "Transfer-Encoding: chunked"}
    head = f"GET {path} HTTP/1.1\r\nHost: a\r\n{sizes[framing]}\r\n\r\n".encode()
    block = bytes(1 << 20) if framing == "a length" else b"1\r\na\r\n" * 100_000
    sent = 0
    with socket.create_connection(url.split(":"), timeout=10) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            while sent < 380:
                connection.sendall(block)
                sent += 1
    assert sent < 60, "the connection is closed long before"
    assert exchange(url, head + block[: 1 << 16], 5)[9:12] == status


@pytest.mark.parametrize("method", ["ServerLive", "ServerReady", "ServerMetadata"])
def test_a_large_message_of_a_small_call_is_refused(server, method):
    call = mg.Call(mg.SERVICE + method, b"\x0a\x80\x80\x80\x20" + bytes(1 << 26), ())
    [(status, words)] = call_all(server, [call])
    assert status != "OK"
    assert "too large" in words.lower()


def test_bodies_that_are_never_finished_take_no_memory_without_end(server):
    head = b"POST /v2/models/audioldm2/generate HTTP/1.1\r\nHost: a\r\nContent-Length: 2000000\r\n\r\n"
    with contextlib.ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection(server.http_url.split(":"), timeout=5)) for _ in range(300)
        ]
        with contextlib.suppress(OSError):
            for connection in connections:
                connection.sendall(head + bytes(1_900_000))
        time.sleep(1)  # Envoy's measure of its own heap is that old at most


def test_a_writer_of_one_byte_now_and_then_and_a_reader_who_does_not_read_hold_nobody_up(server):
    path = b"POST /v2/models/audioldm2/generate HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n%s"
    body = json.dumps({**GOOD, "audio_length_in_s": 10.24}).encode()
    with contextlib.ExitStack() as stack:
        readers, writers = (
            [stack.enter_context(socket.create_connection(server.http_url.split(":"))) for _ in range(number)]
            for number in (4, 50)
        )
        stop = threading.Event()
        for reader in readers:
            reader.sendall(path % (len(body), body))

        def write():
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    for writer in writers:
                        writer.send(b"P")

        thread = threading.Thread(target=write)
        thread.start()
        try:
            started = time.monotonic()
            generate(server)
            assert time.monotonic() - started < 30
        finally:
            stop.set()
            thread.join()
