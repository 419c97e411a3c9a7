"""The public contract over the wire, with nothing but plain HTTP and tritonclient."""

import json
import math
import urllib.error
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer
from tests.helpers.triton_configs import INPUT_TYPES

SHORT = {"num_inference_steps": [2], "audio_length_in_s": [0.64]}


def infer(module, client, **inputs):
    tensors = []
    for name, values in inputs.items():
        datatype, dtype = INPUT_TYPES[name]
        tensor = module.InferInput(name, [len(values)], datatype)
        tensor.set_data_from_numpy(np.array(values, dtype))
        tensors.append(tensor)
    return client.infer("audioldm2", tensors)


@pytest.fixture
def http_client(triton: EmbeddedServer):
    client = tritonclient.http.InferenceServerClient(triton.http_url, network_timeout=120)
    yield client
    client.close()


@pytest.fixture(params=["grpc", "http"])
def call(request, grpc_client):
    """A function that calls the ensemble over the protocol of the parameter."""
    if request.param == "grpc":
        return lambda **inputs: infer(tritonclient.grpc, grpc_client, **inputs)
    client = request.getfixturevalue("http_client")
    return lambda **inputs: infer(tritonclient.http, client, **inputs)


def post_generate(triton: EmbeddedServer, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://{triton.http_url}/v2/models/audioldm2/generate", data=json.dumps(body).encode()
    )
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        return json.loads(response.read())


def test_generate_answers_a_prompt_alone(triton):
    answer = post_generate(triton, {"prompt": "a dog barking"})
    assert len(answer["audio"]) == 163_840
    assert answer["sampling_rate"] == 16_000
    assert answer["used_seed"] >= 0
    assert math.isnan(answer["clap_score"])


def test_generate_takes_every_input(triton):
    body = {
        "prompt": "a dog barking",
        "negative_prompt": "low quality",
        "num_inference_steps": 2,
        "guidance_scale": 2.5,
        "audio_length_in_s": 0.64,
        "num_waveforms_per_prompt": 1,
        "seed": 7,
        "scheduler": "DDIMScheduler",
        "eta": 0.5,
    }
    first, second = (post_generate(triton, body) for _ in range(2))
    assert len(first["audio"]) == 10_240
    assert first["used_seed"] == 7
    assert first["audio"] == second["audio"]


def test_plain_clients_get_every_output(call):
    result = call(prompt=[b"a cat", b"a dog"], num_waveforms_per_prompt=[2], seed=[3], **SHORT)
    outputs = {name: result.as_numpy(name) for name in ("audio", "sampling_rate", "used_seed", "clap_score")}
    assert {name: (array.dtype, array.shape) for name, array in outputs.items()} == {
        "audio": (np.float32, (4, 10_240)),
        "sampling_rate": (np.int32, (1,)),
        "used_seed": (np.int64, (1,)),
        "clap_score": (np.float32, (4,)),
    }
    assert outputs["sampling_rate"][0] == 16_000
    assert outputs["used_seed"][0] == 3
    assert np.abs(outputs["audio"]).max() <= 1


def test_audio_that_is_not_finite_is_an_error(call):
    with pytest.raises(InferenceServerException, match=r"\[INTERNAL\] .* not finite"):
        call(prompt=[b"a dog"], guidance_scale=[3.4e38], seed=[1], num_inference_steps=[1], audio_length_in_s=[0.04])
