"""The client against a real Triton server, over gRPC and HTTP."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from audioldm2_client import (
    AudioLDM2Client,
    AudioLDM2Error,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
    _network,
)


def echo(client: AudioLDM2Client, prompt="echo", **options) -> dict:
    """Everything that arrived at the model."""
    with pytest.raises(InvalidRequestError) as caught:
        client.generate(prompt, **options)
    words = str(caught.value)
    assert words.startswith("[INVALID_ARG] ")
    return {"error": caught.value} | json.loads(words.removeprefix("[INVALID_ARG] "))


def test_generation_returns_what_the_contract_says(client):
    result = client.generate("a dog barking", audio_length_in_s=0.5, seed=7)
    assert (result.audio.shape, result.audio.dtype) == ((1, 8000), np.float32)
    assert (result.sampling_rate, result.seed, result.prompts) == (16000, 7, ("a dog barking",))
    assert np.isnan(result.clap_scores).all()
    assert 0.4 < np.abs(result.audio).max() <= 0.5


def test_prompts_and_candidates_become_rows_with_scores(client):
    result = client.generate(["a", "b"], num_waveforms_per_prompt=3, audio_length_in_s=0.1)
    assert result.audio.shape == (6, 1600)
    assert result.clap_scores.tolist() == sorted(result.clap_scores, reverse=True)


def test_only_the_prompt_arrives_when_only_the_prompt_is_given(client):
    assert echo(client)["values"] == {"prompt": ["echo"]}


def test_every_option_arrives_with_its_type(client):
    options = {
        "negative_prompt": ["low quality", "noise"],
        "num_inference_steps": 25,
        "guidance_scale": 2.5,
        "guidance_start": 0.25,
        "guidance_end": 0.75,
        "audio_length_in_s": 5.0,
        "num_waveforms_per_prompt": 2,
        "seed": 2**63 - 1,
        "scheduler": "DDIMScheduler",
        "eta": 0.5,
    }
    arrived = echo(client, ["echo", "b"], **options)
    expected = {name: value if isinstance(value, list) else [value] for name, value in options.items()}
    assert arrived["values"] == {"prompt": ["echo", "b"]} | expected
    assert arrived["dtypes"] == {
        "prompt": "object",
        "negative_prompt": "object",
        "num_inference_steps": "int32",
        "guidance_scale": "float32",
        "guidance_start": "float32",
        "guidance_end": "float32",
        "audio_length_in_s": "float32",
        "num_waveforms_per_prompt": "int32",
        "seed": "int64",
        "scheduler": "object",
        "eta": "float32",
    }


def test_utf8_prompt_arrives_unchanged(client):
    prompt = "echo ein bellender Hund, 犬の鳴き声 🐕 \0 ende"
    assert echo(client, prompt)["values"]["prompt"] == [prompt]


def test_request_id_and_deadline_reach_the_model_and_ids_differ(client):
    first, second = echo(client, timeout_s=12.5), echo(client)
    assert first["id"] == first["error"].request_id
    assert len({first["id"], second["id"]}) == 2
    assert (first["timeout_us"], second["timeout_us"]) == (12_500_000, 20_000_000)


def test_message_above_the_grpc_default_limit_arrives_whole(client):
    result = client.generate("long", audio_length_in_s=160.0)
    assert result.audio.shape == (1, 2_560_000)
    assert result.audio.nbytes > 2 * 4 * 2**20
    assert np.abs(result.audio[0, -8000:]).max() > 0.4


@pytest.mark.parametrize(
    ("prompt", "error_class"),
    [
        ("fail INVALID_ARG [INVALID_ARG] prompt must not be blank", InvalidRequestError),
        ("fail UNAVAILABLE too many requests wait, send it again later", ServerBusyError),
        ("fail CANCELLED [CANCELLED] the request was cancelled", RequestCancelledError),
        ("fail CANCELLED [DEADLINE] 2 s have passed", DeadlineExceededError),
    ],
)
def test_failure_has_its_class_and_the_servers_sentence(client, prompt, error_class):
    with pytest.raises(AudioLDM2Error) as caught:
        client.generate(prompt)
    assert type(caught.value) is error_class
    words = prompt.split(" ", 2)[2]
    assert str(caught.value) == words
    assert caught.value.server_message == f"in ensemble 'audioldm2', {words}"


@pytest.mark.parametrize("prompt", ["fail INTERNAL out of memory", "fail UNSUPPORTED no", "fail NOT_FOUND no file"])
def test_fault_names_words_and_request_id(client, prompt):
    with pytest.raises(ServerFaultError) as caught:
        client.generate(prompt)
    words = prompt.split(" ", 2)[2]
    assert str(caught.value) == f"the server failed on request {caught.value.request_id}: {words}"


def test_bug_in_the_model_is_a_server_fault(client):
    with pytest.raises(ServerFaultError, match="ValueError: boom"):
        client.generate("raise boom")


def test_error_text_beyond_ascii_arrives_unchanged(client):
    with pytest.raises(InvalidRequestError, match=r"^größer als 10 µs 犬$"):
        client.generate("fail INVALID_ARG größer als 10 µs 犬")


def test_unknown_model_is_named_with_the_address(url):
    with AudioLDM2Client(url, model_name="audioldm3") as client, pytest.raises(ModelNotFoundError) as caught:
        client.generate("x")
    assert url in str(caught.value)
    assert "'audioldm3'" in str(caught.value)


def test_another_model_of_the_same_contract_can_be_called(url):
    with AudioLDM2Client(url, model_name="toy_generator") as client:
        assert client.generate("x").sampling_rate == 16000
        with pytest.raises(InvalidRequestError, match=r"^no prefix here$"):
            client.generate("fail INVALID_ARG no prefix here")


def test_timeout_is_a_deadline_error_and_the_client_stays_usable(client, waiting):
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError, match=r"within 0\.3 s") as caught:
        client.generate(f"wait {waiting}", timeout_s=0.3)
    assert 0.3 <= time.monotonic() - start < 3
    assert caught.value.request_id in str(caught.value)
    assert client.generate("next", seed=8).seed == 8


def test_one_client_serves_several_threads(client):
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: client.generate("x", seed=seed), range(12)))
    assert [result.seed for result in results] == list(range(12))


def test_closing_twice_is_harmless_and_a_closed_client_says_so(url):
    client = AudioLDM2Client(url)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="client is closed"):
        client.generate("x")


@pytest.fixture
def free_port() -> Iterator[int]:
    """A port on which nobody listens: bound, so that nobody else can, but not listening."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def listener() -> Iterator[Callable[[bool], int]]:
    """Starts a listener that isn't Triton; it hangs up at once, or accepts and says nothing. Returns its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    threads = []

    def hang_up() -> None:
        try:
            while True:
                listening.accept()[0].close()
        except OSError:
            return  # closed below

    def start(hangs_up: bool) -> int:
        if hangs_up:
            threads.append(threading.Thread(target=hang_up))
            threads[0].start()
        return listening.getsockname()[1]

    yield start
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("scheme", "usual_port"), [("grpc", "8001"), ("http", "8000")])
def test_refused_connection_names_the_address_and_the_next_step(free_port, scheme, usual_port):
    url = f"{scheme}://127.0.0.1:{free_port}"
    with AudioLDM2Client(url) as client, pytest.raises(ServerUnreachableError) as caught:
        client.generate("x")
    assert f"can't reach a Triton server at {url}" in str(caught.value)
    assert f"port, {usual_port} unless configured" in str(caught.value)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_unknown_host_is_unreachable(scheme):
    with AudioLDM2Client(f"{scheme}://nosuch.invalid:8001") as client, pytest.raises(ServerUnreachableError):
        client.generate("x", timeout_s=20)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_server_that_hangs_up_is_unreachable(listener, scheme):
    with AudioLDM2Client(f"{scheme}://127.0.0.1:{listener(True)}") as client, pytest.raises(ServerUnreachableError):
        client.generate("x")


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_silent_server_is_given_up_at_the_deadline(listener, scheme):
    with AudioLDM2Client(f"{scheme}://127.0.0.1:{listener(False)}") as client, pytest.raises(DeadlineExceededError):
        client.generate("x", timeout_s=0.3)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_connection_that_is_never_made_is_unreachable_long_before_the_deadline(monkeypatch, scheme):
    monkeypatch.setattr(_network, "CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        # The one place in the queue is taken: the kernel drops further attempts.
        url = f"{scheme}://127.0.0.1:{full.getsockname()[1]}"
        start = time.monotonic()
        with AudioLDM2Client(url) as client, pytest.raises(ServerUnreachableError):
            client.generate("x", timeout_s=20)
        assert time.monotonic() - start < 5


def test_wrong_protocol_on_the_port_is_unreachable(toy_server):
    for url in (f"grpc://{toy_server.http_url}", f"http://{toy_server.grpc_url}"):
        with AudioLDM2Client(url) as client, pytest.raises(ServerUnreachableError, match="check that"):
            client.generate("x")


def test_result_of_a_real_generation_can_be_saved(client, tmp_path: Path):
    path = client.generate("a dog").save(tmp_path / "dog.wav")
    assert path.stat().st_size == 44 + 2 * 16000
