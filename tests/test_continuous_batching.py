"""Continuous batching over a real Triton: full queues, deadlines, cancellation, shutdown, company."""

import functools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.grpc
from audioldm2_client import AudioLDM2Client
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer
from tests.helpers import job_calls, waiting
from tests.helpers.parity_cases import relative_rms_error
from tests.helpers.tiny_unet import (
    make_request,
    make_unet,
    reference_latents,
    relative_rms,
    write_unet_repository,
)
from tests.helpers.unet_calls import UnetCaller, metric

pytestmark = pytest.mark.server

TIMEOUT_S = 60.0

wait_until = functools.partial(waiting.wait_until, timeout_s=TIMEOUT_S, what="the metrics")


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Room for one guided request at a time, and for 16 in the queue."""
    repository = write_unet_repository(
        tmp_path_factory.mktemp("narrow") / "models", max_queue_size=16, max_rows=2, drain_timeout_s=1
    )
    with EmbeddedServer(repository) as server:
        yield server


@pytest.fixture
def caller(narrow_server: EmbeddedServer) -> Iterator[UnetCaller]:
    wait_until(lambda: metric(narrow_server, "requests_in_flight") == 0)  # the metrics may be a poll behind
    with tritonclient.grpc.InferenceServerClient(narrow_server.grpc_url) as client:
        yield UnetCaller(client)


def test_a_full_queue_refuses_at_once_and_loses_nothing(caller):
    for _ in range(64):
        caller.call(steps=15)
    answers = [caller.next_answer() for _ in range(64)]
    refused = [error for _, error in answers if error]
    assert {error.status() for error in refused} == {"StatusCode.UNAVAILABLE"}
    assert all(
        error.message() == "[UNAVAILABLE] the queue is full with 16 requests: try again later." for error in refused
    )
    # One runs, 16 wait; the first may be done before the last one comes.
    assert 17 <= 64 - len(refused) <= 20
    first_success = next(index for index, (_, error) in enumerate(answers) if error is None)
    assert first_success >= len(refused) - 2, "refusals don't wait for results"


def test_a_cancelled_call_frees_its_rows(caller, narrow_server):
    before = metric(narrow_server, "requests_total", outcome="cancelled")
    call = caller.call(steps=1000)
    wait_until(lambda: metric(narrow_server, "requests_in_flight") == 1)
    call.cancel()
    _, error = caller.next_answer()
    assert error.status() == "StatusCode.CANCELLED"
    wait_until(lambda: metric(narrow_server, "requests_in_flight") == 0)
    assert metric(narrow_server, "requests_total", outcome="cancelled") == before + 1
    caller.call(steps=1)
    assert caller.next_answer()[1] is None


def test_a_passed_deadline_is_answered_and_frees_its_rows(caller, narrow_server):
    caller.call(steps=1000, timeout_us=200_000)
    _, error = caller.next_answer()
    assert error.status() == "StatusCode.CANCELLED"
    assert re.search(r"\[DEADLINE\] the time was up after \d+ of 1000 steps", error.message())
    wait_until(lambda: metric(narrow_server, "requests_in_flight") == 0)
    assert metric(narrow_server, "requests_total", outcome="deadline", reason="DeadlineError") >= 1


def test_a_deadline_passes_in_the_queue_too(caller, narrow_server):
    first = caller.call(steps=1000)
    wait_until(lambda: metric(narrow_server, "requests_in_flight") == 1)
    caller.call(steps=1, timeout_us=100_000)
    _, error = caller.next_answer()
    assert "[DEADLINE] the time was up before there was room" in error.message()
    first.cancel()
    caller.next_answer()


def test_bad_requests_are_refused_beside_good_ones(caller):
    caller.call(steps=5, scheduler="Nonsense")
    caller.call(steps=5, frames=10**6)
    caller.call(steps=5)
    answers = [caller.next_answer() for _ in range(3)]
    messages = sorted(error.message() for _, error in answers if error)
    assert [message.split(" ")[:2] for message in messages] == [
        ["[INVALID_ARG]", "latents_shape"],
        ["[INVALID_ARG]", "scheduler"],
    ]


def test_served_latents_are_those_of_diffusers(caller):
    request = {"steps": 7, "scheduler": "UniPCMultistepScheduler", "seed": 5, "waveforms_per_prompt": 3}
    caller.call(**request)
    result, error = caller.next_answer()
    assert error is None
    latents = torch.tensor(result.as_numpy("latents"))
    assert relative_rms(latents, reference_latents(make_unet(), make_request(**request))) <= 1e-5


def test_a_server_that_stops_finishes_or_answers_what_runs(tmp_path):
    repository = write_unet_repository(tmp_path / "models", drain_timeout_s=1)
    server = EmbeddedServer(repository, stop_timeout_s=20)
    with server, tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        caller = UnetCaller(client)
        caller.call(steps=30)
        wait_until(lambda: metric(server, "requests_in_flight") == 1)
        server.stop()
        _, error = caller.next_answer()
        assert error is None


@pytest.mark.parametrize("front", [True, False])
def test_a_server_that_stops_answers_what_does_not_finish_in_time(exported_repository, front):
    server = EmbeddedServer(exported_repository, stop_timeout_s=4, front=front).start()
    with ThreadPoolExecutor(8) as threads:
        callers = [threads.submit(job_calls.generate, server, f"c{n}", num_inference_steps=1000) for n in range(8)]
        for number in range(8):
            job_calls.wait_for_state(server, f"c{number}", "denoising")
        assert server.stop() == (8 if front else 0), "Triton itself doesn't tell how many"
        answers = [caller.result(timeout=10) for caller in callers]
    assert [answer.status for answer in answers] == [503] * 8
    assert all("[UNAVAILABLE] the server " in answer.error for answer in answers)


EIGHT_KINDS = (
    {"prompt": "a dog", "num_inference_steps": 50},
    {"prompt": "rain on a tin roof", "num_inference_steps": 30, "guidance_scale": 1.0, "scheduler": "DDIMScheduler"},
    {"prompt": "a church bell ringing in the distance " * 4, "num_inference_steps": 12, "guidance_scale": 7.0},
    {"prompt": "birds", "num_inference_steps": 20, "scheduler": "UniPCMultistepScheduler", "negative_prompt": "noise"},
    {"prompt": "wind", "num_inference_steps": 25, "scheduler": "EulerAncestralDiscreteScheduler"},
    {"prompt": "a cat", "num_inference_steps": 10, "scheduler": "PNDMScheduler", "guidance_scale": 0.0},
    {"prompt": "an engine starts", "num_inference_steps": 40, "scheduler": "euler", "guidance_start": 0.2},
    {"prompt": "footsteps on gravel, slowly", "num_inference_steps": 15, "scheduler": "DDIMScheduler", "eta": 1.0},
)


def test_eight_kinds_at_once_share_forwards_and_each_gets_its_solo_result(triton):
    def generate(kind: dict[str, Any]) -> np.ndarray:
        return client.generate(**kind, audio_length_in_s=0.64, seed=7).audio

    with AudioLDM2Client(triton.grpc_url) as client, ThreadPoolExecutor(8) as threads:
        forwards = [metric(triton, "rows_per_forward_count")]
        solo = [generate(kind) for kind in EIGHT_KINDS]
        wait_until(lambda: metric(triton, "requests_in_flight") == 0)
        forwards.append(metric(triton, "rows_per_forward_count"))
        together = list(threads.map(generate, EIGHT_KINDS))
        wait_until(lambda: metric(triton, "requests_in_flight") == 0)
        forwards.append(metric(triton, "rows_per_forward_count"))
    errors = [relative_rms_error(b, a) for a, b in zip(solo, together, strict=True)]
    assert max(errors) <= 1e-3, errors
    longest = max(kind["num_inference_steps"] for kind in EIGHT_KINDS)
    assert forwards[2] - forwards[1] <= 1.2 * longest < (forwards[1] - forwards[0]) / 3


def test_the_timeout_of_a_request_to_the_ensemble_ends_its_denoising(triton, grpc_client):
    inputs = [
        tritonclient.grpc.InferInput("prompt", [1], "BYTES"),
        tritonclient.grpc.InferInput("num_inference_steps", [1], "INT32"),
    ]
    inputs[0].set_data_from_numpy(np.array([b"a dog"], np.object_))
    inputs[1].set_data_from_numpy(np.array([1000], np.int32))
    before = metric(triton, "requests_total", outcome="deadline")
    with pytest.raises(
        InferenceServerException, match=r"\[DEADLINE\] the time was up after \d+ of 1000 steps"
    ) as caught:
        grpc_client.infer("audioldm2", inputs, timeout=700_000)
    assert caught.value.status() == "StatusCode.CANCELLED"
    wait_until(lambda: metric(triton, "requests_in_flight") == 0)
    assert metric(triton, "requests_total", outcome="deadline") == before + 1


def test_metrics_tell_what_the_loop_did(triton):
    for name in ("steps_total", "rows_per_forward_sum", "seconds_per_forward_sum"):
        assert metric(triton, name) > 0
    assert metric(triton, "requests_waiting") == 0
    assert metric(triton, "requests_total", outcome="finished", reason="ok", model="unet", version="1") > 0


def test_a_bad_parameter_stops_the_start_and_is_named(tmp_path):
    repository = write_unet_repository(tmp_path / "models", max_rows=0)
    with pytest.raises(Exception, match="parameter max_rows must be a positive whole number, got '0'"):
        EmbeddedServer(repository).start()
