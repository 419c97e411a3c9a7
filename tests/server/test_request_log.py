"""The log of requests on its way to the operator: out of Triton's log, from the front, and onto standard output."""

import contextlib
import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import request_log as stages_log
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer, ServerError
from server.line_writer import MAX_WAITING, LineWriter
from server.request_log import (
    FORMAT_VARIABLE,
    REFUSALS_AT_ONCE,
    REFUSALS_PER_S,
    RequestLog,
    format_line,
    is_refusal,
    read_format,
    request_line,
    with_time,
    without_request_lines,
)
from tests.helpers import tiny_repository as tiny
from tests.helpers.waiting import wait_until

TIMEOUT_S = 30
PROMPT = "a dog that nobody may read of"
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
NASTY = ["plain", "a b", 'say "x"', "back\\slash", "a=b", "tab\tnew\nline", "ü", "\u2028", "", 'x" outcome="finished']


class Lines:
    """What a server says of requests, in the order in which it does."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def of(self, request_id: str) -> list[str]:
        return [line for line in self.all if f"id={request_id} " in line]

    def wait_for(self, request_id: str) -> str:
        wait_until(lambda: self.of(request_id), TIMEOUT_S, f"{request_id} is in {self.all[-5:]}")
        [line] = self.of(request_id)
        return line


@pytest.fixture(scope="module")
def lines() -> Lines:
    return Lines()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, lines: Lines) -> Iterator[EmbeddedServer]:
    """An ensemble `nap`, which takes as long as it is told."""
    folder = tmp_path_factory.mktemp("request_log")
    tiny.add_python_model(folder, "slow", SLOW, SLOW_CONFIG)
    naps = tiny.tensors("TYPE_FP32 dims: [ 1 ]", "TYPE_FP32 dims: [ 1 ]")
    tiny.add_chain(folder, "nap", naps, [("slow", "x=x", "x=y")])
    with EmbeddedServer(folder, stop_timeout_s=5, on_request=lines.all.append) as running:
        yield running


def send(
    server: EmbeddedServer,
    body: bytes | str,
    request_id: str,
    path: str = "/v2/models/nap/infer",
    timeout_s: float = 30,
) -> tuple[int, dict[str, str]]:
    headers = {"X-Request-Id": request_id, "Authorization": "Bearer hush-hush"}
    connection = http.client.HTTPConnection(server.http_url, timeout=timeout_s)
    try:
        connection.request("POST", path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, dict(answer.headers)
    finally:
        connection.close()


def nap(seconds: float, kind: str = "FP32") -> str:
    return json.dumps({"inputs": [{"name": "x", "datatype": kind, "shape": [1], "data": [seconds]}]})


def door_metrics(server: EmbeddedServer) -> dict[str, float]:
    connection = http.client.HTTPConnection(server.metrics_url, timeout=TIMEOUT_S)
    connection.request("GET", "/metrics/door")
    text = connection.getresponse().read().decode()
    connection.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")}


@pytest.mark.parametrize("value", NASTY)
@pytest.mark.parametrize("log_format", stages_log.FORMATS)
def test_the_front_writes_the_form_that_the_stages_write(value, log_format):
    fields = {"id": value, "steps": 20, "total_s": 0.5}
    expected = {
        "text": f"request {' '.join(f'{name}={stages_log._logfmt(field)}' for name, field in fields.items())}",
        "json": json.dumps({"event": "request", **fields}),
    }
    line = format_line("request", fields, log_format)
    assert line == expected[log_format]
    assert len(line.splitlines()) == 1
    assert line.count("outcome=finished") == 0


def test_the_formats_and_their_variable_are_those_of_the_stages():
    assert (stages_log.FORMAT_VARIABLE, stages_log.FORMATS) == (FORMAT_VARIABLE, ("text", "json"))
    assert read_format({}) == read_format({FORMAT_VARIABLE: ""}) == "text"
    with pytest.raises(ServerError, match=f"{FORMAT_VARIABLE} must be one of text, json, got 'xml'"):
        read_format({FORMAT_VARIABLE: "xml"})


@pytest.mark.parametrize("value", NASTY)
def test_a_line_comes_out_of_tritons_quotes_as_it_was_written(value):
    line = format_line("request", {"id": value, "outcome": "finished"}, "text")
    escaped = json.dumps(line)  # as Triton's log does it
    logged = f"I1126 01:38:04.123456 4711 model.py:101] {escaped}"
    assert request_line(logged) == line
    assert without_request_lines(f"before\n{logged}\nafter\n") == "before\nafter\n"


@pytest.mark.parametrize(
    "line",
    [
        'I1126 01:38:04.123456 4711 http_server.cc:101] "request id=a outcome=finished"',
        'E1126 01:38:04.123456 4711 model.py:101] "request id=a outcome=finished"',
        'I1126 01:38:04.123456 4711 model.py:101] "asked: request id=a outcome=finished"',
        "request id=a outcome=finished",
        '{"event": "other", "id": "a"}',
    ],
)
def test_what_only_looks_like_a_request_is_left_in_tritons_log(line):
    assert request_line(line) == ""
    assert without_request_lines(f"{line}\n") == f"{line}\n"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_no_id_makes_a_refusal_of_a_request(log_format):
    for value in (*NASTY, "outcome=refused ", ' outcome=refused x="', '"outcome": "refused", '):
        line = format_line("request", {"id": value, "outcome": "finished", "reason": "ok"}, log_format)
        assert not is_refusal(line), line
        line = format_line("request", {"id": value, "outcome": "refused", "reason": "ok"}, log_format)
        assert is_refusal(line), line


def test_the_time_stands_before_a_line_of_either_format():
    assert with_time("request id=a", 1.25) == "time=1970-01-01T00:00:01.250Z request id=a"
    line = json.loads(with_time('{"event": "request", "id": "a"}', 1.25))
    assert list(line.items()) == [("time", "1970-01-01T00:00:01.250Z"), ("event", "request"), ("id", "a")]


def test_a_flood_of_refusals_leaves_few_lines_and_their_number():
    written: list[str] = []
    now = [0.0]
    log = RequestLog(written.append, "text", lambda: now[0])
    for _ in range(10_000):
        now[0] += 0.001
        log.add_request(id="a", outcome="refused")
        log.flush()
    refusals = [line for line in written if line.startswith("request")]
    assert REFUSALS_AT_ONCE < len(refusals) + len(written) - len(refusals) <= REFUSALS_AT_ONCE + 10 * REFUSALS_PER_S + 1
    log.flush(at_end=True)
    left_out = sum(int(line.rpartition("=")[2]) for line in written if line.startswith("left_out refusals="))
    assert len(refusals) + left_out == 10_000


def test_what_was_computed_has_its_line_in_any_flood():
    written: list[str] = []
    log = RequestLog(written.append, "text", lambda: 0.0)
    for _ in range(1000):
        log.add_request(id="a", outcome="refused")
        log.add_request(id="b", outcome="finished")
    assert sum("id=b" in line for line in written) == 1000


def test_a_reader_who_does_not_read_holds_up_nobody_and_is_told_what_is_missing():
    reading, writing = os.pipe()
    writer = LineWriter(writing, lambda lost: f"{lost} lost")
    started = time.monotonic()
    number = 0
    while number < 5 * MAX_WAITING:  # far more than a pipe holds
        writer.write(f"{number} {'x' * 100}")
        number += 1
    assert time.monotonic() - started < 5
    while len(writer._waiting) < MAX_WAITING:  # the thread may have had no turn before
        writer.write(f"{number} {'x' * 100}")
        number += 1
    writer.write("needed", is_needed=True)
    closing = threading.Thread(target=writer.close)
    closing.start()
    with open(reading, closefd=True) as lines:  # noqa: PTH123 - a pipe
        threading.Thread(target=lambda: (closing.join(), os.close(writing))).start()
        read = lines.read().splitlines()
    lost = [int(line.split()[0]) for line in read if line.endswith("lost")]
    written = [line for line in read if "x" in line]
    assert len(written) + sum(lost) == number
    assert "needed" in read


def test_lines_to_a_closed_reader_are_dropped():
    reading, writing = os.pipe()
    os.close(reading)
    writer = LineWriter(writing, str)
    writer.write("a")
    writer.close()
    os.close(writing)


@pytest.mark.server
@pytest.mark.parametrize(
    ("request_id", "path", "body", "reason", "error"),
    [
        ("no-model", "/v2/models/slow/infer", nap(0), "NOT_FOUND", "Request for unknown model: 'slow' is not found"),
        ("no-path", "/v2/repository/index", "{}", "NOT_FOUND", "[NOT_FOUND] '/v2/repository/index' can't be reached"),
        ("no-json", "/v2/models/nap/infer", f'{{"{PROMPT}', "INVALID_ARG", "[INVALID_ARG] the body isn't JSON"),
        ("too-deep", "/v2/models/nap/infer", '{"a":' + "[" * 99 + "]" * 99 + "}", "INVALID_ARG", "deeper than 16"),
        ("a-type", "/v2/models/nap/infer", nap(0, "INT32"), "INVALID_ARG", ""),
        ("no-text", "/v2/models/nap/generate", json.dumps({"x": {"a": PROMPT}}), "INVALID_ARG", ""),
    ],
)
def test_each_refusal_of_the_front_has_a_line(server, lines, request_id, path, body, reason, error):
    name = f'audioldm2_front_requests_total{{outcome="refused",reason="{reason}"}}'
    before = door_metrics(server)[name]
    status, headers = send(server, body, request_id, path)
    assert 400 <= status <= 500
    assert headers["x-request-id"] == request_id
    line = lines.wait_for(request_id)
    assert f"outcome=refused reason={reason} protocol=http" in line
    assert error in line
    assert ("error=" in line) == bool(error)
    assert door_metrics(server)[name] == before + 1
    assert PROMPT not in line
    assert "hush" not in line


@pytest.mark.server
def test_a_refusal_over_grpc_has_its_line_and_its_id(server, lines):
    x, wrong = (tritonclient.grpc.InferInput("x", [size], "FP32") for size in (1, 2))
    x.set_data_from_numpy(np.zeros(1, np.float32))
    wrong.set_data_from_numpy(np.zeros(2, np.float32))
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        with pytest.raises(InferenceServerException):
            client.infer("slow", [x], request_id="grpc-no-model")
        with pytest.raises(InferenceServerException, match="shape"):
            client.infer("nap", [wrong], request_id="grpc-shape")
    assert "model=slow outcome=refused reason=NOT_FOUND protocol=grpc error=" in lines.wait_for("grpc-no-model")
    assert "model=nap outcome=refused reason=INVALID_ARG protocol=grpc" in lines.wait_for("grpc-shape")


@pytest.mark.server
def test_what_is_answered_has_no_line_of_the_front(server, lines):
    assert send(server, nap(0), "fine")[0] == 200
    send(server, nap(0), "after-it", "/v2/models/slow/infer")
    lines.wait_for("after-it")
    assert lines.of("fine") == []


@pytest.mark.server
def test_a_caller_who_leaves_has_a_line_when_he_does(server, lines):
    with pytest.raises(TimeoutError):
        send(server, nap(3), "impatient", timeout_s=0.3)
    line = lines.wait_for("impatient")
    assert "model=nap outcome=left reason=CANCELLED protocol=http total_s=0." in line


@pytest.mark.server
def test_a_flood_at_the_door_is_counted_whole_and_logged_in_part(server, lines):
    name = 'audioldm2_front_requests_total{outcome="refused",reason="NOT_FOUND"}'
    before, first = door_metrics(server)[name], len(lines.all)
    connection = http.client.HTTPConnection(server.http_url, timeout=TIMEOUT_S)
    for _ in range(500):
        connection.request("GET", "/v2/models/nothing")
        connection.getresponse().read()
    connection.close()

    def told() -> int:
        said = lines.all[first:]
        shown = sum("reason=NOT_FOUND" in line for line in said)
        return shown + sum(int(line.rpartition("=")[2]) for line in said if line.startswith("left_out refusals="))

    wait_until(lambda: told() == 500, TIMEOUT_S, "what was left out is told")
    assert len(lines.all) - first < 500
    assert door_metrics(server)[name] == before + 500


@pytest.mark.server
def test_a_request_that_is_lost_with_triton_has_a_line_and_the_restart_is_counted(server, lines):
    with contextlib.suppress(OSError):
        caller = threading.Thread(target=send, args=[server, nap(30), "lost-one"])
        caller.start()
        wait_until(lambda: door_metrics(server)["audioldm2_front_live_requests"] == 1, TIMEOUT_S, "it is with Triton")
        [stub] = [
            pid for pid, line in tiny.processes_of(server._model_repository).items() if "/slow/1/model.py" in line
        ]
        os.kill(stub, signal.SIGKILL)
        caller.join(TIMEOUT_S)
    line = lines.wait_for("lost-one")
    assert "model=nap outcome=lost reason=UNAVAILABLE protocol=http total_s=" in line
    assert 'error="[UNAVAILABLE] stage slow died' in line
    restarts = 'audioldm2_server_restarts_total{process="slow"}'
    wait_until(lambda: door_metrics(server)["audioldm2_server_ready"] == 1, TIMEOUT_S, "it is ready again")
    assert door_metrics(server)[restarts] == 1
    assert send(server, nap(0), "after-the-restart")[0] == 200


@pytest.mark.server
def test_the_front_tells_the_memory_of_each_process(server):
    sizes = {name: value for name, value in door_metrics(server).items() if "resident_memory" in name}
    names = {re.search('process="(.*)"', name)[1] for name in sizes}
    assert names == {"slow", "tritonserver", "envoy", "door"}
    assert min(sizes.values()) > 1e6


@pytest.mark.server
def test_the_logs_of_the_front_are_short(server):
    folder: Path = server._folder.path  # tests alone need it
    logs = [folder / name for name in ("envoy.log", "front.log")]
    for path in logs:
        with path.open("ab") as log:
            log.write(b"x" * (5 << 20))
    wait_until(lambda: max(path.stat().st_blocks for path in logs) * 512 <= 2 << 20, TIMEOUT_S, "both are trimmed")
