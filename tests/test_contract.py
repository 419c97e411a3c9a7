"""The public contract over the wire, with nothing but plain HTTP and tritonclient."""

import itertools
import json
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer
from tests.helpers.triton_configs import INPUT_TYPES, load_json

SHORT = {"num_inference_steps": [2], "audio_length_in_s": [0.64]}
SHORTEST = {"num_inference_steps": [1], "audio_length_in_s": [0.04], "seed": [7]}
OUTPUTS = ("audio", "sampling_rate", "used_seed", "clap_score", "truncated_tokens")
SUBSETS = [subset for size in range(1, 6) for subset in itertools.combinations(OUTPUTS, size)]


def infer(module, client, outputs=None, model_name="audioldm2", **inputs):
    tensors, wanted = [], outputs and [module.InferRequestedOutput(name) for name in outputs]
    for name, values in inputs.items():
        datatype, dtype = INPUT_TYPES[name]
        tensor = module.InferInput(name, [len(values)], datatype)
        tensor.set_data_from_numpy(np.array(values, dtype))
        tensors.append(tensor)
    return client.infer(model_name, tensors, outputs=wanted)


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


def post(triton: EmbeddedServer, path: str, body: dict) -> dict:
    request = urllib.request.Request(f"http://{triton.http_url}/v2/models/{path}", data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as response:  # noqa: S310
        return load_json(response.read())


def post_generate(triton: EmbeddedServer, body: dict) -> dict:
    return post(triton, "audioldm2/generate", body)


def test_generate_answers_a_prompt_alone(triton):
    answer = post_generate(triton, {"prompt": "a dog barking"})
    assert len(answer["audio"]) == 163_840
    assert answer["sampling_rate"] == 16_000
    assert answer["used_seed"] >= 0
    assert answer["clap_score"] == -2


def test_generate_takes_every_input(triton):
    body = {
        "prompt": "a dog barking",
        "negative_prompt": "low quality",
        "num_inference_steps": 2,
        "guidance_scale": 2.5,
        "guidance_start": 0.2,
        "guidance_end": 0.8,
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


def test_scores_are_cosines_where_candidates_are_ranked_and_below_every_cosine_elsewhere(call):
    alone, ranked = (
        call(prompt=[b"a cat", b"a dog"], num_waveforms_per_prompt=[num_waveforms], **SHORTEST).as_numpy("clap_score")
        for num_waveforms in (1, 2)
    )
    assert alone.tolist() == [-2, -2]
    assert (ranked.dtype, ranked.shape) == (np.float32, (4,))
    assert (np.abs(ranked) <= 1.0001).all()


@pytest.mark.parametrize("body", [{}, {"num_waveforms_per_prompt": 2}, {"prompt": ["a cat", "a dog"]}])
@pytest.mark.parametrize("path", ["audioldm2/generate", "audioldm2_cached/generate", "audioldm2/infer"])
def test_every_answer_is_json_that_a_browser_reads(triton, path, body):
    inputs = {"prompt": "a dog", "num_inference_steps": 1, "audio_length_in_s": 0.04} | body
    if path.endswith("infer"):
        lists = {name: value if isinstance(value, list) else [value] for name, value in inputs.items()}
        tensors = [
            {"name": name, "datatype": INPUT_TYPES[name][0], "shape": [len(values)], "data": values}
            for name, values in lists.items()
        ]
        answer = post(triton, path, {"inputs": tensors})
        assert {output["name"] for output in answer["outputs"]} == set(OUTPUTS)
    else:
        assert set(OUTPUTS) <= post(triton, path, inputs).keys()


@pytest.mark.parametrize("model_name", ["audioldm2", "audioldm2_cached"])
def test_every_subset_of_the_outputs_can_be_asked_for(grpc_client, model_name):
    for subset in SUBSETS:
        result = infer(tritonclient.grpc, grpc_client, subset, model_name, prompt=[b"a dog"], **SHORTEST)
        assert {output.name for output in result.get_response().outputs} == set(subset)


@pytest.mark.parametrize("subset", SUBSETS[:5], ids=str)
def test_one_output_can_be_asked_for_over_http(http_client, subset):
    result = infer(tritonclient.http, http_client, subset, prompt=[b"a dog"], **SHORTEST)
    assert [output["name"] for output in result.get_response()["outputs"]] == list(subset)


def test_the_cached_model_draws_a_seed_where_none_is_given(triton):
    inputs = {"prompt": "a dog", "num_inference_steps": 1, "audio_length_in_s": 0.04}
    answer = post(triton, "audioldm2_cached/generate", inputs)
    assert post(triton, "audioldm2/generate", inputs | {"seed": answer["used_seed"]})["audio"] == answer["audio"]


def test_audio_that_is_not_finite_is_an_error(call):
    with pytest.raises(InferenceServerException, match=r"\[INTERNAL\] .* not finite"):
        call(prompt=[b"a dog"], guidance_scale=[3.4e38], seed=[1], num_inference_steps=[1], audio_length_in_s=[0.04])
