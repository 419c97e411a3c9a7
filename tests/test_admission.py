"""Admission, its metrics and the log over a real Triton: who is let in, who is refused, and what is told of both."""

import json
import re
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from server import EmbeddedServer
from tests.helpers.job_calls import TIMEOUT_S, Answer, ask, generate, post, wait_for_state, wait_until_rows_are_free
from tests.helpers.triton_configs import INPUT_TYPES
from tests.helpers.waiting import wait_until

LONG_TEXT = "a dog barking in the rain " * 100
REFUSAL_GUARD_S = 2.0
"""A refusal takes some milliseconds; this is for a machine that is busy with others."""
SHORT = {"num_inference_steps": 2, "audio_length_in_s": 0.04}


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(40) as executor:
        yield executor


@pytest.fixture(autouse=True)
def _nothing_is_live(triton: EmbeddedServer) -> None:
    wait_until(lambda: admission(triton) == [0, 0, 0], TIMEOUT_S, "nothing of another test is live")


def metrics(server: EmbeddedServer) -> dict[str, float]:
    """Values by name and labels, as they stand there."""
    with urllib.request.urlopen(f"http://{server.metrics_url}/metrics", timeout=TIMEOUT_S) as response:
        lines = response.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("audio"))}


def admission(server: EmbeddedServer) -> list[float]:
    found = metrics(server)
    return [found[f'audioldm2_admission_{name}{{model="audioldm2"}}'] for name in ("tokens", "rows", "seconds")]


def log_line(server: EmbeddedServer, request_id: str) -> str:
    """Return the one line about a request; it is written within a second."""
    pattern = rf'"(request id={re.escape(request_id)} .*)"$'
    wait_until(lambda: re.search(pattern, server.log_text(), re.MULTILINE), TIMEOUT_S, f"{request_id} is in the log")
    [line] = re.findall(pattern, server.log_text(), re.MULTILINE)
    return line


def send_texts(server: EmbeddedServer, request_id: str, texts: list[str], **inputs: Any) -> tuple[Answer, float]:
    """Call the ensemble with several prompts; return the answer and the seconds that it took."""
    tensors = [{"name": "prompt", "shape": [len(texts)], "datatype": "BYTES", "data": texts}]
    for name, value in inputs.items():
        tensors.append({"name": name, "shape": [1], "datatype": INPUT_TYPES[name][0], "data": [value]})
    started = time.monotonic()
    answer = post(server, "audioldm2/infer", json.dumps({"id": request_id, "inputs": tensors}).encode())
    return answer, answer.arrived_s - started


def test_of_a_flood_of_long_texts_two_are_let_in_and_the_others_refused_at_once(triton, threads):
    calls = [
        threads.submit(send_texts, triton, f"flood {number}", [LONG_TEXT] * 16, num_inference_steps=1000)
        for number in range(20)
    ]
    wait_until(lambda: sum(call.done() for call in calls) == 18, TIMEOUT_S, "18 refusals")
    refusals = [call.result() for call in calls if call.done()]
    assert {answer.status for answer, _ in refusals} == {503}
    sentence = r"\[UNAVAILABLE\] the server is full: it has \d+ (tokens of text to encode|rows to denoise) of at most "
    assert all(re.search(sentence, answer.error) for answer, _ in refusals), refusals[0]
    assert max(seconds for _, seconds in refusals) < REFUSAL_GUARD_S
    for number in range(20):
        ask(triton, f"flood {number}", "cancel")
    left_at = time.monotonic()
    assert generate(triton, "small after the flood", **SHORT).status == 200
    assert time.monotonic() - left_at < 10, "nobody waits for those who have left"
    errors = [call.result()[0].error for call in calls]
    assert sum("[CANCELLED]" in error for error in errors) == 2
    wait_until_rows_are_free(triton)
    wait_until(lambda: admission(triton) == [0, 0, 0], TIMEOUT_S, "nothing is counted any more")


def test_a_refusal_is_unavailable_over_grpc(triton, grpc_client, threads):
    running = threads.submit(
        generate, triton, "full", num_inference_steps=1000, audio_length_in_s=0.04, num_waveforms_per_prompt=16
    )
    wait_for_state(triton, "full", "denoising")
    prompt = tritonclient.grpc.InferInput("prompt", [16], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a dog"] * 16, np.object_))
    candidates = tritonclient.grpc.InferInput("num_waveforms_per_prompt", [1], "INT32")
    candidates.set_data_from_numpy(np.array([3], np.int32))
    with pytest.raises(InferenceServerException, match=r"\[UNAVAILABLE\] .* 32 rows .* has 96: try again") as caught:
        grpc_client.infer("audioldm2", [prompt, candidates], request_id="too much beside it")
    assert caught.value.status() == "StatusCode.UNAVAILABLE"
    assert ask(triton, "too much beside it")["state"] == "failed"
    assert "outcome=refused reason=UNAVAILABLE" in log_line(triton, '\\"too much beside it\\"')
    ask(triton, "full", "cancel")
    assert "[CANCELLED]" in running.result(TIMEOUT_S).error


def test_a_full_server_is_known_to_the_front_until_one_of_its_requests_ends(triton, threads):
    inputs = {"num_inference_steps": 1000, "audio_length_in_s": 0.04, "num_waveforms_per_prompt": 16}
    filling = [threads.submit(generate, triton, f"filling {number}", **inputs) for number in range(3)]
    wait_until(lambda: admission(triton)[1] >= 92, TIMEOUT_S, "96 rows")
    refusals = []
    for number in range(20):
        refusals.append(generate(triton, f"too many {number}", **SHORT))
        time.sleep(0.02)
    assert {answer.status for answer in refusals} == {503}
    assert all("[UNAVAILABLE] the server is full: it has 96 rows" in answer.error for answer in refusals)
    assert sum("in ensemble" not in answer.error for answer in refusals) >= 15, "the front's own"
    for number in range(3):
        ask(triton, f"filling {number}", "cancel")
        assert "[CANCELLED]" in filling[number].result(TIMEOUT_S).error
    assert generate(triton, "there is room again", **SHORT).status == 200


def test_calls_that_end_at_their_own_deadline_leave_nothing_that_is_counted_or_computed(triton, grpc_client, threads):
    prompt = tritonclient.grpc.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([b"a dog"], np.object_))

    def call(number: int) -> None:
        with pytest.raises(InferenceServerException, match=r"(?i)deadline exceeded"):
            grpc_client.infer(
                "audioldm2", [prompt], request_id=f"own deadline {number}", client_timeout=0.003 * (1 + number % 30)
            )

    list(threads.map(call, range(90)))
    time.sleep(1.0)  # until those that were on their way have come, and are in the metrics
    wait_until(lambda: admission(triton) == [0, 0, 0], 10, "nobody works for them, and nobody is thought to")
    reasons = re.findall(r'request id=\\"own deadline \d+\\" .*reason=(\w+)', triton.log_text())
    assert reasons
    assert set(reasons) <= {"CANCELLED", "DEADLINE"}, reasons


def test_long_texts_whose_grpc_callers_leave_while_they_are_encoded_are_soon_not_counted(triton, grpc_client, threads):
    prompt = tritonclient.grpc.InferInput("prompt", [16], "BYTES")
    prompt.set_data_from_numpy(np.array([LONG_TEXT.encode()] * 16, np.object_))

    def call(number: int) -> None:
        with pytest.raises(InferenceServerException, match=r"(?i)deadline exceeded"):
            grpc_client.infer("audioldm2", [prompt], request_id=f"long {number}", client_timeout=0.5)

    calls = [threads.submit(call, number) for number in range(2)]
    wait_until(lambda: admission(triton)[0] > 10_000, TIMEOUT_S, "they are let in")
    for one in calls:
        one.result(TIMEOUT_S)
    wait_until(lambda: admission(triton) == [0, 0, 0], 10, "nobody encodes them, and nobody is thought to")


def test_as_many_clients_as_fill_the_loop_are_let_in(triton, threads):
    answers = list(threads.map(lambda number: generate(triton, f"client {number}", **SHORT), range(40)))
    assert [answer.error for answer in answers if answer.status != 200] == []


def test_a_request_whose_text_waits_is_dropped_there_when_it_is_cancelled(triton, threads):
    texts = [LONG_TEXT] * 16
    first = threads.submit(send_texts, triton, "text first", texts, num_inference_steps=1, audio_length_in_s=0.04)
    wait_for_state_in_text(triton, "text first")
    second = threads.submit(send_texts, triton, "text second", texts, num_inference_steps=1)
    wait_for_state_in_text(triton, "text second")
    ask(triton, "text second", "cancel")
    answer, _ = second.result(TIMEOUT_S)
    assert re.search(r"\[CANCELLED\] the request was cancelled before it came to (text_encoder|gpt2)\.", answer.error)
    assert answer.status == 400
    assert ask(triton, "text second")["state"] == "cancelled"
    assert "outcome=cancelled reason=CANCELLED" in log_line(triton, '\\"text second\\"')
    assert first.result(TIMEOUT_S)[0].status == 200


def wait_for_state_in_text(server: EmbeddedServer, request_id: str) -> None:
    wait_until(lambda: ask(server, request_id)["state"] == "queued", TIMEOUT_S, f"{request_id} has come")


def test_a_cancellation_that_overtakes_its_request_ends_it(triton):
    assert ask(triton, "overtaken", "cancel")["state"] == "unknown"
    answer = generate(triton, "overtaken", num_inference_steps=1000)
    assert "[CANCELLED] the request was cancelled before it came." in answer.error
    assert answer.status == 400
    assert ask(triton, "overtaken")["state"] == "cancelled"
    assert generate(triton, "overtaken", **SHORT).status == 200, "the next one with the id is another request"


def test_a_timeout_that_is_over_ends_a_request_before_its_text_is_encoded(triton):
    assert "[DEADLINE] the time was up before" in generate(triton, "at once", timeout_us=1).error
    assert "outcome=deadline reason=DEADLINE" in log_line(triton, '\\"at once\\"')


@pytest.mark.parametrize(
    ("request_id", "inputs", "outcome", "reason", "stages"),
    [
        ("log-ok", {}, "finished", "ok", ["text", "queue", "denoise", "decode", "total"]),
        ("log-bad", {"num_inference_steps": 0}, "refused", "INVALID_ARG", []),
        ("log-late", {"num_inference_steps": 1000, "timeout_us": 700_000}, "deadline", "DEADLINE", ["text", "total"]),
        (
            "log-nan",
            {"guidance_scale": 3.4e38, "seed": 1, "num_inference_steps": 1},
            "failed",
            "INTERNAL",
            ["text", "queue", "total"],
        ),
    ],
)
def test_each_request_is_logged_in_a_line_and_counted(triton, request_id, inputs, outcome, reason, stages):
    before = metrics(triton)
    generate(triton, request_id, prompt="a secret sound", **SHORT | inputs)
    fields = dict(field.split("=") for field in log_line(triton, request_id).split(" ")[1:])
    assert (fields["model"], fields["outcome"], fields["reason"]) == ("audioldm2", outcome, reason)
    assert re.fullmatch(r"[0-9a-f]{16}", fields["ticket"])
    if stages:
        asked = SHORT | inputs
        assert fields["steps"] == str(asked["num_inference_steps"])
        assert (fields["length_s"], fields["prompts"], fields["candidates"]) == ("0.04", "1", "1")
    for stage in stages:
        assert 0 <= float(fields[f"{stage}_s"]) <= float(fields["total_s"]) < TIMEOUT_S

    def added(name: str, labels: str) -> float:
        key = f'audioldm2_{name}{{model="audioldm2",{labels}}}'
        return metrics(triton)[key] - before[key]

    requests = f'outcome="{outcome}",reason="{reason}"'
    wait_until(lambda: added("requests_total", requests) == 1, TIMEOUT_S, "the request is counted")
    for stage in stages:
        name = f'stage="{stage}"'
        wait_until(lambda name=name: added("request_seconds_count", name) == 1, TIMEOUT_S, f"{name} is counted")
    assert "a secret sound" not in triton.log_text()


def test_a_request_without_an_id_is_logged_with_the_one_that_the_front_drew(triton):
    wait_until_rows_are_free(triton)
    pattern = r'"request id=[0-9a-f]{32} ticket=[0-9a-f]{16} model=audioldm2 outcome=finished'
    before = len(re.findall(pattern, triton.log_text()))
    assert generate(triton, "", **SHORT).status == 200
    wait_until(lambda: len(re.findall(pattern, triton.log_text())) == before + 1, TIMEOUT_S, "it is in the log")


def test_the_audio_that_was_delivered_and_the_build_are_told(triton):
    name = 'audioldm2_audio_seconds_total{model="audioldm2"}'
    before = metrics(triton)[name]
    assert generate(triton, "", num_inference_steps=1, audio_length_in_s=0.64, num_waveforms_per_prompt=2).status == 200
    wait_until(lambda: metrics(triton)[name] == pytest.approx(before + 1.28), TIMEOUT_S, "the audio is counted")
    [build] = [name for name in metrics(triton) if name.startswith("audioldm2_build_info")]
    assert 'checkpoint="checkpoint"' in build
    assert 'model="audioldm2"' in build


def call(client: tritonclient.grpc.InferenceServerClient, model: str, arrays: dict[str, np.ndarray]) -> Any:
    """Call a stage directly."""
    tensors = []
    for name, array in arrays.items():
        tensors.append(tritonclient.grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    return client.infer(model, tensors)


POSTPROCESS = {
    "waveform": np.zeros((4, 200), np.float32),
    "num_samples": np.array([50], np.int64),
    "sampling_rate": np.array([16_000], np.int32),
    "num_waveforms_per_prompt": np.array([2], np.int32),
    "clap_text_embeds": np.zeros((2, 4), np.float32),
    "seed": np.array([7], np.int64),
    "truncated_tokens": np.zeros(2, np.int32),
}


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"num_samples": np.array([201], np.int64)}, "[INVALID_ARG] num_samples is out of bounds"),
        ({"num_waveforms_per_prompt": np.array([3], np.int32)}, "[INVALID_ARG] num_waveforms_per_prompt must divide"),
        ({"clap_text_embeds": np.zeros((1, 4), np.float32)}, "[INVALID_ARG] clap_text_embeds must have a row"),
        ({}, "[INVALID_ARG] clap_text_embeds must be"),
        ({"sampling_rate": np.array([0], np.int32)}, "[INVALID_ARG] sampling_rate is out of bounds"),
        ({"deadline_unix_us": np.array([1], np.int64)}, "[DEADLINE] the time was up after the last step"),
    ],
)
def test_the_last_stage_refuses_what_does_not_fit_and_goes_on(grpc_client, bad, sentence):
    with pytest.raises(InferenceServerException) as caught:
        call(grpc_client, "postprocess", POSTPROCESS | bad)
    assert caught.value.message().startswith(sentence)
    good = POSTPROCESS | {"num_waveforms_per_prompt": np.array([1], np.int32)}
    assert call(grpc_client, "postprocess", good).as_numpy("audio").shape == (4, 50)
