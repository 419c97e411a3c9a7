"""The model `jobs` over a real Triton: it watches and cancels requests that run through the whole ensemble."""

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from audioldm2_client import AudioLDM2Client
from job_board import JobBoard
from job_folder import folder_of
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from server import EmbeddedServer
from tests.helpers import tiny_repository
from tests.helpers.job_calls import (
    TIMEOUT_S,
    Answer,
    ask,
    generate,
    post,
    wait_for,
    wait_for_state,
    wait_until_rows_are_free,
)
from tests.helpers.parity_cases import relative_rms_error

UNKNOWN = {"state": "unknown", "step": 0, "total_steps": 0, "requests_ahead": 0}
OVER = ("done", "failed", "cancelled")


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


@pytest.fixture
def board(triton: EmbeddedServer) -> JobBoard:
    """The server's own board, as its models see it."""
    warnings: list[str] = []
    board = JobBoard(folder_of("jobs", triton.pid), warnings.append)
    assert warnings == []
    return board


def start(threads: ThreadPoolExecutor, server: EmbeddedServer, request_id: str, **inputs: Any) -> "Future[Answer]":
    return threads.submit(generate, server, request_id, **inputs)


def test_the_steps_of_a_generation_are_seen_in_rising_order(triton, threads):
    answer = start(threads, triton, "watched", num_inference_steps=100, audio_length_in_s=1.28)
    seen = []
    while not seen or seen[-1]["state"] not in OVER:
        said = ask(triton, "watched")
        if not seen or said != seen[-1]:
            seen.append(said)
    assert answer.result(TIMEOUT_S).status == 200
    steps = [said["step"] for said in seen if said["state"] == "denoising"]
    assert steps == sorted(steps)
    assert len(set(steps)) >= 10
    assert {said["total_steps"] for said in seen if said["state"] == "denoising"} == {100}
    order = ["unknown", "queued", "denoising", "decoding", "done"]
    states = [said["state"] for said in seen]
    assert states == sorted(states, key=order.index)
    assert {"denoising", "decoding", "done"} <= set(states)
    assert seen[-1] == {"state": "done", "step": 100, "total_steps": 100, "requests_ahead": 0}


def test_a_cancelled_generation_ends_at_once_and_frees_its_rows(triton, threads, record_property):
    answer = start(threads, triton, "cancelled", num_inference_steps=1000, audio_length_in_s=5.12)
    first = wait_for(triton, "cancelled", lambda said: said["step"] >= 2)
    said = ask(triton, "cancelled", "cancel")
    assert said["state"] == "denoising"
    ended = answer.result(TIMEOUT_S)
    assert ended.status == 400
    assert "[CANCELLED] the request was cancelled after " in ended.error
    last_step = int(ended.error.split(" after ")[1].split(" of 1000 steps")[0])
    assert first["step"] <= last_step <= said["step"] + 10, "not many steps were done after it"
    record_property("steps_after_cancel", last_step - said["step"])
    assert ask(triton, "cancelled")["state"] == "cancelled"
    wait_until_rows_are_free(triton)
    assert ask(triton, "cancelled", "cancel")["state"] == "cancelled", "again"


def test_a_grpc_caller_gets_cancelled(triton, threads):
    inputs = [
        tritonclient.grpc.InferInput("prompt", [1], "BYTES"),
        tritonclient.grpc.InferInput("num_inference_steps", [1], "INT32"),
    ]
    inputs[0].set_data_from_numpy(np.array([b"a dog"], np.object_))
    inputs[1].set_data_from_numpy(np.array([1000], np.int32))
    with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
        call = threads.submit(client.infer, "audioldm2", inputs, request_id="by grpc")
        wait_for_state(triton, "by grpc", "denoising")
        ask(triton, "by grpc", "cancel")
        with pytest.raises(InferenceServerException, match=r"\[CANCELLED\]") as caught:
            call.result(TIMEOUT_S)
    assert caught.value.status() == "StatusCode.CANCELLED"


def test_a_generation_is_seen_and_cancelled_in_the_queue(triton, threads):
    running = start(
        threads, triton, "running", num_inference_steps=1000, audio_length_in_s=0.32, num_waveforms_per_prompt=16
    )
    wait_for_state(triton, "running", "denoising")
    waiting = []
    for ahead in range(3):  # one after the other: their order is that of the queue
        waiting.append(start(threads, triton, f"waiting {ahead}", num_inference_steps=30, audio_length_in_s=0.32))
        expected = {"state": "queued", "step": 0, "total_steps": 30, "requests_ahead": ahead}
        wait_for(triton, f"waiting {ahead}", lambda said, expected=expected: said == expected)
    ask(triton, "waiting 0", "cancel")
    assert "[CANCELLED] the request was cancelled before there was room" in waiting[0].result(TIMEOUT_S).error
    assert ask(triton, "waiting 0")["state"] == "cancelled"
    wait_for(triton, "waiting 2", lambda said: said["requests_ahead"] == 1)
    ask(triton, "running", "cancel")
    assert "[CANCELLED]" in running.result(TIMEOUT_S).error
    assert [answer.result(TIMEOUT_S).status for answer in waiting] == [400, 200, 200]
    assert ask(triton, "waiting 2")["state"] == "done"
    wait_until_rows_are_free(triton)


def postprocess(client: tritonclient.grpc.InferenceServerClient, request_id: str, ticket: int) -> Any:
    """Call the last stage as the ensemble would."""
    arrays = {
        "waveform": np.zeros((1, 100), np.float32),
        "num_samples": np.array([50], np.int64),
        "sampling_rate": np.array([16_000], np.int32),
        "num_waveforms_per_prompt": np.array([1], np.int32),
        "clap_text_embeds": np.zeros((1, 4), np.float32),
        "seed": np.array([7], np.int64),
        "truncated_tokens": np.zeros(1, np.int32),
        "job_ticket": np.array([ticket], np.int64),
    }
    tensors = []
    for name, array in arrays.items():
        tensors.append(tritonclient.grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    return client.infer("postprocess", tensors, request_id=request_id)


def test_a_cancel_during_decoding_is_seen_before_the_last_stage(triton, grpc_client, board):
    entry = board.create_entry("decoded")
    ticket = entry.ticket
    entry.report("denoising", 19, 20)
    entry.end("decoding")
    assert ask(triton, "decoded", "cancel") == {"state": "decoding", "step": 20, "total_steps": 20, "requests_ahead": 0}
    with pytest.raises(InferenceServerException, match=r"\[CANCELLED\] .* after its last step") as caught:
        postprocess(grpc_client, "decoded", ticket)
    assert caught.value.status() == "StatusCode.CANCELLED"
    assert ask(triton, "decoded")["state"] == "cancelled"


def test_the_last_stage_leaves_an_id_alone_that_a_later_request_owns(triton, grpc_client, board):
    earlier, later = board.create_entry("twice"), board.create_entry("twice")
    ask(triton, "twice", "cancel")
    assert postprocess(grpc_client, "twice", earlier.ticket).as_numpy("audio").shape == (1, 50)
    assert ask(triton, "twice")["state"] == "queued"
    assert later.is_cancelled()
    later.end("cancelled")


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"num_inference_steps": 0}, "[INVALID_ARG] num_inference_steps"),
        ({"scheduler": "PNDMScheduler", "num_inference_steps": 1}, "[INVALID_ARG]"),
        ({"guidance_scale": 3.4e38, "seed": 1, "num_inference_steps": 1, "audio_length_in_s": 0.04}, "[INTERNAL]"),
        ({"num_inference_steps": 1000, "timeout_us": 700_000}, "[DEADLINE]"),
    ],
    ids=["tokenizer", "unet", "not finite", "deadline"],
)
def test_a_generation_that_fails_is_seen_as_failed(triton, inputs, sentence, request):
    request_id = f"fails: {request.node.callspec.id}"
    assert sentence in generate(triton, request_id, **inputs).error
    assert ask(triton, request_id)["state"] == "failed"


def test_generate_takes_an_id_too(triton):
    body = {"id": "by curl", "prompt": "a dog", "num_inference_steps": 2, "audio_length_in_s": 0.04}
    assert post(triton, "audioldm2/generate", json.dumps(body).encode()).status == 200
    assert ask(triton, "by curl") == {"state": "done", "step": 2, "total_steps": 2, "requests_ahead": 0}


def test_the_contracts_example_runs_as_it_stands(triton, threads):
    document = (tiny_repository.ROOT / "docs" / "contract.md").read_text()
    [example] = re.findall(r"^```console\n(.*?)^```", document, re.DOTALL | re.MULTILINE)
    first, second, third = [line.removeprefix("$ ") for line in example.splitlines() if line.startswith("$ ")]
    answers = [json.loads(line) for line in example.splitlines() if line.startswith("{")]

    def run(command: str) -> dict[str, Any]:
        line = command.removesuffix(" &").replace("localhost:8000", triton.http_url).replace("curl ", "curl --silent ")
        shell = ["bash", "-c", line]
        done = subprocess.run(shell, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
        return json.loads(done.stdout)

    generation = threads.submit(run, first)
    wait_for_state(triton, "8c1f6a52", "denoising")
    for command, answer in ((second, answers[0]), (third, answers[1])):
        assert run(command) | {"step": 0} == answer | {"step": 0}
    assert "[CANCELLED]" in generation.result(TIMEOUT_S)["error"]


def test_an_id_can_be_used_again_also_after_a_cancellation(triton, threads):
    answer = start(threads, triton, "again", num_inference_steps=1000)
    wait_for_state(triton, "again", "denoising")
    ask(triton, "again", "cancel")
    assert answer.result(TIMEOUT_S).status == 400
    assert generate(triton, "again", num_inference_steps=2, audio_length_in_s=0.04).status == 200
    assert ask(triton, "again")["state"] == "done"


@pytest.mark.parametrize(
    "request_id", ["", "a" * 129, "../../etc/passwd", " ", "a\0b", "🐕", "fd/0"], ids=lambda text: repr(text[:8])
)
def test_a_generation_with_a_hostile_id_is_served(triton, request_id):
    assert generate(triton, request_id, num_inference_steps=1, audio_length_in_s=0.04).status == 200


def test_an_id_that_is_not_utf_8_is_refused_in_a_sentence(triton):
    body = json.dumps({"id": "ID", "inputs": []}).encode().replace(b"ID", b"\xff\xfe")
    answer = post(triton, "audioldm2/infer", body)
    assert (answer.status, answer.error) == (400, "[INVALID_ARG] the body must be UTF-8, and byte 8 of it isn't.")


@pytest.mark.parametrize(
    "request_id", ["never seen", "../../etc/shadow", "/dev/null", "b\0c", "  ", "a" * 128, "🐕" * 32]
)
def test_an_id_that_nobody_knows_is_unknown_also_when_it_is_cancelled(triton, request_id):
    assert ask(triton, request_id) == ask(triton, request_id, "status") == ask(triton, request_id, "cancel") == UNKNOWN


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b'{"request_id": ""}', "[INVALID_ARG] request_id is out of bounds: "),
        (b'{"request_id": "%s"}' % (b"a" * 129), "[INVALID_ARG] request_id is out of bounds: "),
        (b'{"request_id": "\xff"}', "[INVALID_ARG] the body must be UTF-8, and byte 16 of it isn't."),
        (b'{"request_id": "a", "action": "stop"}', "[INVALID_ARG] action must be one of status, cancel, got 'stop'."),
        (b'{"request_id": "a", "action": ""}', "[INVALID_ARG] action must be one of status, cancel, got ''."),
    ],
)
def test_a_wrong_question_is_refused_with_a_sentence(triton, body, sentence):
    answer = post(triton, "jobs/generate", body)
    assert answer.status == 400
    assert answer.error.startswith(sentence)
    assert ask(triton, "never seen") == UNKNOWN


def test_grpc_callers_get_every_output_and_invalid_argument(grpc_client):
    def call(request_id: bytes, action: bytes) -> Any:
        tensors = [tritonclient.grpc.InferInput(name, [1], "BYTES") for name in ("request_id", "action")]
        for tensor, value in zip(tensors, (request_id, action), strict=True):
            tensor.set_data_from_numpy(np.array([value], np.object_))
        return grpc_client.infer("jobs", tensors)

    result = call(b"nobody's", b"status")
    assert result.as_numpy("state").tolist() == [b"unknown"]
    for name in ("step", "total_steps", "requests_ahead"):
        assert (result.as_numpy(name).dtype, result.as_numpy(name).tolist()) == (np.int32, [0])
    with pytest.raises(InferenceServerException, match=r"^\S+ \[INVALID_ARG\] request_id must be UTF-8") as caught:
        call(b"\xff", b"cancel")
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_a_watched_generation_gives_the_same_audio(triton, threads):
    options: dict[str, Any] = {"num_inference_steps": 20, "audio_length_in_s": 0.64}
    with AudioLDM2Client(triton.grpc_url) as client:
        expected = client.generate("a dog", seed=7, **options).audio
    answer = start(threads, triton, "compared", **options)
    wait_for(triton, "compared", lambda said: said["state"] in OVER)
    [audio] = [output for output in answer.result(TIMEOUT_S).body["outputs"] if output["name"] == "audio"]
    assert relative_rms_error(np.array(audio["data"], np.float32).reshape(audio["shape"]), expected) <= 1e-3
