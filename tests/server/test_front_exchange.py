"""What the door says to each part of a request and of its answer, by the messages that Envoy sends."""

import asyncio
import json
import os
import struct
import time

import pytest
from envoy.config.core.v3 import base_pb2
from envoy.service.ext_proc.v3 import external_processor_pb2 as ext_proc
from google.protobuf import struct_pb2
from tritonclient.grpc import service_pb2

from server.front.door import Door
from server.front.exchange import Exchange
from server.front.full_models import FULL_FILE, HOLDS_S
from server.front.targets import Access
from server.request_log import RequestLog

UNHEALTHY = "in ensemble 'audioldm2', Stub process 'unet_0_0' is not healthy."
GENERATE = {":method": "POST", ":path": "/v2/models/audioldm2/generate"}
CALL = {
    ":method": "POST",
    ":path": "/inference.GRPCInferenceService/ModelInfer",
    "content-type": "application/grpc",
}


class Triton:
    """A channel whose calls are kept, and never answered."""

    def __init__(self) -> None:
        self.requests: list[service_pb2.ModelInferRequest] = []

    def unary_unary(self, method, **_):
        async def call(request, **_):
            if method.endswith("ModelInfer"):
                self.requests.append(request)

        return call

    def stream_stream(self, *_, **__):
        return None


@pytest.fixture
def lines():
    return []


@pytest.fixture
def faults():
    return []


@pytest.fixture
def triton():
    return Triton()


@pytest.fixture
def door(lines, faults, triton):
    access = Access(frozenset({"audioldm2", "jobs"}))
    return Door(access, ["jobs"], triton, RequestLog(lines.append, "logfmt"), faults.append)


def headers(values, *, end_of_stream=False):
    encoded = [base_pb2.HeaderValue(key=key, raw_value=value.encode()) for key, value in values.items()]
    return ext_proc.HttpHeaders(headers=base_pb2.HeaderMap(headers=encoded), end_of_stream=end_of_stream)


def request_headers(values, **options):
    return ext_proc.ProcessingRequest(request_headers=headers(values, **options))


def request_body(body):
    return ext_proc.ProcessingRequest(request_body=ext_proc.HttpBody(body=body, end_of_stream=True))


def response_headers(values, detail="via_upstream", **options):
    attributes = {"envoy.filters.http.ext_proc": struct_pb2.Struct()}
    attributes["envoy.filters.http.ext_proc"].update({"response.code_details": detail})
    return ext_proc.ProcessingRequest(response_headers=headers(values, **options), attributes=attributes)


def response_body(text):
    return ext_proc.ProcessingRequest(response_body=ext_proc.HttpBody(body=text.encode(), end_of_stream=True))


def grpc_body(**fields):
    message = service_pb2.ModelInferRequest(model_name="audioldm2", **fields).SerializeToString()
    return struct.pack(">?I", False, len(message)) + message


def begin(door, *, grpc=False, **fields):
    """An exchange whose request is with Triton."""
    exchange = Exchange(door)
    exchange.respond(request_headers(CALL if grpc else GENERATE))
    body = grpc_body(**fields) if grpc else json.dumps({"prompt": "a dog", **fields}).encode()
    assert exchange.respond(request_body(body)).WhichOneof("response") == "request_body"
    assert exchange.inference is not None
    return exchange


def ask(door, **fields):
    """What the door says to a generation."""
    exchange = Exchange(door)
    exchange.respond(request_headers(GENERATE))
    return exchange.respond(request_body(json.dumps({"prompt": "a dog", **fields}).encode()))


def refusal(response):
    assert response.WhichOneof("response") == "immediate_response"
    answer = response.immediate_response
    return answer.status.code, answer.body.decode()


def set_headers(response):
    mutation = response.response_headers.response.header_mutation
    return {option.header.key: option.header.raw_value.decode() for option in mutation.set_headers}


def test_a_good_answer_passes_with_the_id(door):
    exchange = begin(door, id="mine")
    response = exchange.respond(response_headers({":status": "200"}))
    assert set_headers(response) == {"x-request-id": "mine"}
    assert exchange.inference is None


@pytest.mark.parametrize(
    "detail", ["upstream_reset_before_response_started{connection_termination}", "no_healthy_upstream"]
)
def test_a_lost_server_is_told_in_the_contracts_words(door, lines, detail):
    exchange = begin(door, id="mine")
    door.set_unavailable("stage unet died (signal 9); the server is started again: try again in some seconds.")
    status, words = refusal(exchange.respond(response_headers({":status": "503"}, detail)))
    assert status == 503
    assert words.startswith("[UNAVAILABLE] stage unet died (signal 9); ")
    assert "outcome=lost reason=UNAVAILABLE" in lines[-1]


@pytest.mark.parametrize("status", ["1", "4"])
def test_a_call_that_triton_ends_at_its_own_deadline_is_cancelled_in_the_stages(door, triton, lines, status):
    async def call(*parts):
        async def messages():
            for part in parts:
                yield part

        async for _ in door._process(messages(), None):
            pass
        await asyncio.sleep(0.01)

    body = request_body(grpc_body(id="mine"))
    answer = {":status": "200", "grpc-status": status, "grpc-message": "Deadline Exceeded"}
    asyncio.run(call(request_headers(CALL), body, response_headers(answer)))
    assert "id=mine model=audioldm2 outcome=left reason=CANCELLED" in lines[-1]
    [cancellation] = triton.requests
    assert cancellation.model_name == "jobs"
    assert b"mine" in cancellation.raw_input_contents[0]
    assert b"cancel" in cancellation.raw_input_contents[1]
    assert cancellation.parameters["dropped_by_triton"].bool_param
    refused = {**answer, "grpc-status": "3", "grpc-message": "in ensemble 'audioldm2', [INVALID_ARG] seed ..."}
    asyncio.run(call(request_headers(CALL), body, response_headers(refused)))
    assert len(triton.requests) == 1, "a stage has ended it"


def test_a_model_without_room_is_refused_at_the_door_until_nobody_says_so_any_more(door, lines, tmp_path):
    door.full_models.set_folders([tmp_path / "gone", tmp_path])
    sign = tmp_path / f"{FULL_FILE}audioldm2"
    sign.write_text("the server is full: it has 96 rows to denoise of at most 96: try again later.")
    status, words = refusal(ask(door, id="mine"))
    assert (status, words.startswith("[UNAVAILABLE] the server is full: it has 96 rows")) == (503, True)
    assert "id=mine model=audioldm2 outcome=refused reason=UNAVAILABLE" in lines[-1]
    assert door.num_live == 0
    os.utime(sign, (0, time.time() - 2 * HOLDS_S))
    assert begin(door).inference, "what says it is dead"
    sign.write_text("the server is full.")
    sign.unlink()
    assert begin(door).inference


def test_a_request_that_ends_may_leave_room_for_another_whatever_was_said_before(door, tmp_path):
    door.full_models.set_folders([tmp_path])
    sign = tmp_path / f"{FULL_FILE}audioldm2"
    running = begin(door)
    door._note(running)
    sign.write_text("the server is full.")
    os.utime(sign, (0, time.time() - 0.1))
    assert refusal(ask(door))[0] == 503
    running.inference = None
    door._note(running)
    assert begin(door).inference
    sign.write_text("the server is full.")
    os.utime(sign, (0, time.time() + 0.1))
    assert refusal(ask(door))[0] == 503, "it was said again"


@pytest.mark.parametrize("grpc", [False, True])
def test_a_refusal_of_the_stages_frees_nothing(door, grpc, tmp_path):
    door.full_models.set_folders([tmp_path])
    sentence = "in ensemble 'audioldm2', [UNAVAILABLE] the server is full: it has 95 rows ..."
    refused = begin(door, grpc=grpc)
    door._note(refused)
    (tmp_path / f"{FULL_FILE}audioldm2").write_text("the server is full.")
    if grpc:
        refused.respond(response_headers({":status": "200", "grpc-status": "14", "grpc-message": sentence}))
    else:
        refused.respond(response_headers({":status": "503"}))
        refused.respond(response_body(json.dumps({"error": sentence})))
    assert refused.inference is None
    door._note(refused)
    assert refusal(ask(door))[0] == 503


def test_an_answer_of_a_server_that_is_about_to_be_ended_is_withheld(door):
    exchange = begin(door)
    door.set_unavailable("stage vae has not run for 0.8 s (stopped); ...")
    assert refusal(exchange.respond(response_headers({":status": "200"})))[0] == 503


def test_the_words_for_a_stage_that_triton_has_given_up_end_the_server_over_http(door, faults):
    exchange, other = begin(door), begin(door)
    response = exchange.respond(response_headers({":status": "500"}))
    assert response.mode_override.response_body_mode, "an error is read"
    status, words = refusal(exchange.respond(response_body(json.dumps({"error": UNHEALTHY}))))
    assert (status, words.startswith("[UNAVAILABLE] stage unet")) == (503, True)
    assert len(faults) == 1
    assert refusal(other.respond(response_headers({":status": "200"})))[0] == 503, "the next answers are wrong"
    assert refusal(Exchange(door).respond(request_headers({":method": "GET", ":path": "/v2/health/ready"})))[0] == 503


def test_the_words_for_a_stage_that_triton_has_given_up_end_the_server_over_grpc(door, faults):
    exchange = begin(door, grpc=True)
    message = {":status": "200", "grpc-status": "13", "grpc-message": UNHEALTHY.replace(" ", "%20")}
    response = exchange.respond(response_headers(message, end_of_stream=True))
    assert refusal(response)[1].startswith("[UNAVAILABLE] stage unet")
    assert response.immediate_response.grpc_status.status == 14
    assert len(faults) == 1


def test_an_error_of_a_stage_passes_as_it_is(door, faults, lines):
    exchange = begin(door)
    exchange.respond(response_headers({":status": "400"}))
    words = json.dumps({"error": "in ensemble 'audioldm2', [INVALID_ARG] prompt 0 of 1 is blank."})
    assert exchange.respond(response_body(words)).WhichOneof("response") == "response_body"
    assert (faults, lines, exchange.inference) == ([], [], None)


def test_a_timeout_that_no_stage_has_seen_is_told_as_theirs(door):
    exchange = begin(door, timeout=500_000)
    status, words = refusal(exchange.respond(response_headers({":status": "504"}, "response_timeout")))
    assert (status, words) == (400, "[DEADLINE] the request's timeout of 0.5 s is over.")


def test_a_request_that_is_cut_is_told_that_the_server_stops(door):
    async def stop():
        exchange = begin(door)
        door._note(exchange)
        door.stop()
        assert door.cancel_all() == 1
        await asyncio.sleep(0)
        return exchange

    exchange = asyncio.run(stop())
    assert refusal(exchange.respond(response_headers({":status": "400"}))) == (503, "[UNAVAILABLE] the server stops.")


def test_a_finished_answer_passes_also_where_the_server_stops(door):
    exchange = begin(door)
    exchange.is_cut = True
    door.stop()
    assert exchange.respond(response_headers({":status": "200"})).WhichOneof("response") == "response_headers"


def leave(door, *messages):
    """Envoy's stream ends after these messages; returns when the door has said what it has to say."""

    async def stream():
        for message in messages:
            yield message

    async def run():
        async for _ in door._process(stream(), None):
            pass
        await asyncio.gather(*door._cancellations)

    asyncio.run(run())


@pytest.mark.parametrize("is_grpc", [True, False])
def test_a_caller_who_leaves_is_cancelled_by_its_id(door, triton, lines, is_grpc):
    body = grpc_body(id="mine") if is_grpc else b'{"prompt": "a dog", "id": "mine"}'
    leave(door, request_headers(CALL if is_grpc else GENERATE), request_body(body))
    [request] = triton.requests
    assert ("dropped_by_triton" in request.parameters) == is_grpc, "over HTTP Triton goes on"
    assert request.model_name == "jobs"
    assert [content[4:] for content in request.raw_input_contents] == [b"mine", b"cancel"]
    assert door.num_live == 0
    assert "id=mine" in lines[-1]
    assert "outcome=left" in lines[-1]


@pytest.mark.parametrize(
    "messages",
    [
        [request_headers(GENERATE)],
        [request_headers(GENERATE), request_body(b"{")],
        [request_headers(GENERATE), request_body(b'{"prompt": "a"}'), response_headers({":status": "200"})],
        [request_headers(GENERATE | {":path": "/v2/models/jobs/generate"}), request_body(b'{"request_id": "a"}')],
    ],
)
def test_nobody_else_is(door, triton, messages):
    leave(door, *messages)
    assert triton.requests == []


def test_a_pause_of_the_machine_holds_answers_back(door):
    async def run():
        door._paused_at = time.monotonic()
        started = time.monotonic()
        await door._wait_after_a_pause()
        return time.monotonic() - started

    assert asyncio.run(run()) > 0.4
    door._paused_at -= 10
    assert asyncio.run(door._wait_after_a_pause()) is None
