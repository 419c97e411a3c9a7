"""Every bad input of the contract, over each protocol: its own error, and the next good request works."""

import json
import re
import struct
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from server import EmbeddedServer
from tests.helpers.triton_configs import INPUT_TYPES

GOOD = {"prompt": ["a dog"], "num_inference_steps": [1], "audio_length_in_s": [0.04], "seed": [7]}
NUM_SAMPLES = 640
TIMEOUT_S = 120.0

INT32_MAX, INT64_MIN = 2**31 - 1, -(2**63)
NAN, INFINITY = float("nan"), float("inf")

# What is wrong, and the error's sentence about it, after the ensemble's name.
BAD_VALUES = {
    "no prompts": ({"prompt": []}, "prompt is out of bounds: the number of prompts must be .* got 0."),
    "empty prompt": ({"prompt": [""]}, "prompt 0 of 1 is blank"),
    "blank prompt": ({"prompt": [" \t\r\n\u3000"]}, "prompt 0 of 1 is blank"),
    "one blank prompt of two": ({"prompt": ["a dog", " "]}, "prompt 1 of 2 is blank"),
    "too many prompts": ({"prompt": ["a"] * 17}, "prompt is out of bounds: the number of prompts .* 1 and 16, got 17."),
    "too long prompt": ({"prompt": ["a" * 16385]}, "prompt is out of bounds: the number of bytes .* 16384, got 16385."),
    "too long prompt, in bytes": (
        {"prompt": ["é" * 8193]},
        "prompt is out of bounds: the number of bytes .* got 16386.",
    ),
    "too long negative prompt": ({"negative_prompt": ["a" * 16385]}, "negative_prompt is out of bounds: .* got 16385."),
    "no negative prompts": ({"negative_prompt": []}, r"negative_prompt must hold 1 text or .* \(1\), got 0."),
    "two negative prompts for one": ({"negative_prompt": ["a", "b"]}, r"negative_prompt must hold .* \(1\), got 2."),
    "two negative prompts for three": (
        {"prompt": ["a", "b", "c"], "negative_prompt": ["d", "e"]},
        r"negative_prompt must hold 1 text or as many as there are prompts \(3\), got 2.",
    ),
    "no steps": ({"num_inference_steps": [0]}, "num_inference_steps is out of bounds: .* between 1 and 1000, got 0."),
    "negative steps": ({"num_inference_steps": [-1]}, "num_inference_steps is out of bounds: .* got -1."),
    "huge steps": ({"num_inference_steps": [INT32_MAX]}, f"num_inference_steps is out of bounds: .* got {INT32_MAX}."),
    "one step too many": ({"num_inference_steps": [1001]}, "num_inference_steps is out of bounds: .* got 1001."),
    "NaN guidance": ({"guidance_scale": [NAN]}, "guidance_scale is out of bounds: it must be finite and .* got nan."),
    "infinite guidance": ({"guidance_scale": [INFINITY]}, "guidance_scale is out of bounds: .* got inf."),
    "minus infinite guidance": ({"guidance_scale": [-INFINITY]}, "guidance_scale is out of bounds: .* got -inf."),
    "negative guidance": ({"guidance_scale": [-0.5]}, "guidance_scale is out of bounds: .* got -0.5."),
    "negative start": ({"guidance_start": [-0.5]}, "guidance_start is out of bounds: .* between 0 and 1, got -0.5."),
    "NaN start": ({"guidance_start": [NAN]}, "guidance_start is out of bounds: .* got nan."),
    "end above 1": ({"guidance_end": [1.5]}, "guidance_end is out of bounds: .* between 0 and 1, got 1.5."),
    "infinite end": ({"guidance_end": [INFINITY]}, "guidance_end is out of bounds: .* got inf."),
    "an end before the start": (
        {"guidance_start": [0.8], "guidance_end": [0.4]},
        r"guidance_start must be less than guidance_end \(0.4\), got 0.8.",
    ),
    "length 0": ({"audio_length_in_s": [0]}, "audio_length_in_s is out of bounds: .* between 0.04 and 160, got 0.0."),
    "negative length": ({"audio_length_in_s": [-1]}, "audio_length_in_s is out of bounds: .* got -1.0."),
    "less than a latent frame": ({"audio_length_in_s": [0.039]}, "audio_length_in_s is out of bounds: .* got 0.039."),
    "too long": ({"audio_length_in_s": [160.5]}, "audio_length_in_s is out of bounds: .* got 160.5."),
    "NaN length": ({"audio_length_in_s": [NAN]}, "audio_length_in_s is out of bounds: .* got nan."),
    "infinite length": ({"audio_length_in_s": [INFINITY]}, "audio_length_in_s is out of bounds: .* got inf."),
    "no waveforms": (
        {"num_waveforms_per_prompt": [0]},
        "num_waveforms_per_prompt is out of bounds: .* between 1 and 16, got 0.",
    ),
    "too many waveforms": ({"num_waveforms_per_prompt": [17]}, "num_waveforms_per_prompt is out of bounds: .* got 17."),
    "W x length": (
        {"num_waveforms_per_prompt": [16], "audio_length_in_s": [40.5]},
        "audio_length_in_s is out of bounds: 1 prompts x 16 waveforms x 40.5 s must be at most 640 s, got 648 s.",
    ),
    "P x W x length": (
        {"prompt": ["a"] * 3, "num_waveforms_per_prompt": [2], "audio_length_in_s": [160]},
        "audio_length_in_s is out of bounds: 3 prompts x 2 waveforms x 160 s must be at most 640 s, got 960 s.",
    ),
    "negative seed": (
        {"seed": [-1]},
        "seed is out of bounds: .* got -1.",
    ),
    "smallest seed": ({"seed": [INT64_MIN]}, f"seed is out of bounds: .* got {INT64_MIN}."),
    "unknown scheduler": (
        {"scheduler": ["KarrasScheduler"]},
        "scheduler must be one of .*DDIMScheduler, .*DPMSolverMultistepScheduler, .*got 'KarrasScheduler'.",
    ),
    "no scheduler's name": ({"scheduler": [""]}, "scheduler must be one of DDIMScheduler, .*got ''."),
    "negative eta": ({"eta": [-0.5]}, "eta is out of bounds: .* between 0 and 1, got -0.5."),
    "eta above 1": ({"eta": [1.5]}, "eta is out of bounds: .* got 1.5."),
    "NaN eta": ({"eta": [NAN]}, "eta is out of bounds: .* got nan."),
}
NOT_UTF_8 = {
    "prompt": ({"prompt": [b"a\xff"]}, "prompt must be UTF-8, and byte 1 of it isn't."),
    "surrogate": ({"prompt": [b"\xed\xa0\x80"]}, "prompt must be UTF-8, and byte 0 of it isn't."),
    "negative_prompt": ({"negative_prompt": [b"\xc3"]}, "negative_prompt must be UTF-8, and byte 0 of it isn't."),
    "scheduler": ({"scheduler": [b"DDIM\x80"]}, "scheduler must be UTF-8, and byte 4 of it isn't."),
}


class BadRequestError(Exception):
    """The server's answer was an error of the client's; with its text."""


Call = Callable[..., np.ndarray]


def _as_tensor(module: Any, name: str, values: list[Any], datatype: str, dtype: type, shape: tuple[int, ...]) -> Any:
    tensor = module.InferInput(name, list(shape), datatype)
    encoded = [value.encode() if isinstance(value, str) else value for value in values]
    tensor.set_data_from_numpy(np.array(encoded, dtype).reshape(shape))
    return tensor


def _infer(client: Any, tensors: list[Any]) -> np.ndarray:
    try:
        return client.infer("audioldm2", tensors).as_numpy("audio")
    except InferenceServerException as error:
        if error.status() not in ("StatusCode.INVALID_ARGUMENT", "400"):
            raise
        raise BadRequestError(error.message()) from None


def _generate(url: str, body: bytes) -> np.ndarray:
    try:
        request = urllib.request.Request(f"http://{url}/v2/models/audioldm2/generate", data=body)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
            return np.array([json.loads(response.read())["audio"]], np.float32)
    except urllib.error.HTTPError as error:
        with error:
            message = json.loads(error.read())["error"]
        # Triton's 500 for JSON that it can't read as an input's type is 400 behind the front.
        if error.code != 400:
            raise
        raise BadRequestError(message) from None


@pytest.fixture(params=["grpc", "http"])
def call_tensors(request: pytest.FixtureRequest, triton: EmbeddedServer) -> Iterator[Call]:
    """A function that sends tensors (name, values, datatype, dtype, shape) over the protocol, and returns the audio."""
    if request.param == "grpc":
        module, client = tritonclient.grpc, tritonclient.grpc.InferenceServerClient(triton.grpc_url)
    else:
        module = tritonclient.http
        client = tritonclient.http.InferenceServerClient(triton.http_url, network_timeout=TIMEOUT_S)
    yield lambda tensors: _infer(client, [_as_tensor(module, *tensor) for tensor in tensors])
    client.close()


@pytest.fixture
def generate(triton: EmbeddedServer) -> Call:
    """A function that posts a JSON object to /generate and returns the audio."""
    return lambda inputs: _generate(triton.http_url, json.dumps(inputs).encode())


def _tensors(inputs: dict[str, list[Any]]) -> list[tuple]:
    return [(name, values, *INPUT_TYPES[name], (len(values),)) for name, values in inputs.items()]


def _refusal(call: Call, inputs: Any) -> str:
    """The error's text for bad inputs."""
    with pytest.raises(BadRequestError) as caught:
        call(inputs)
    return str(caught.value)


def _check_refusal(message: str, pattern: str, bad: dict[str, list[Any]]) -> None:
    """Assert that the whole text is the ensemble's name and the sentence that starts as `pattern` says.

    Newer servers than the bundled one refuse an empty list by themselves; what they say names the input.
    """
    ours = rf"in ensemble 'audioldm2', (\[request id: \S+\] )?\[INVALID_ARG\] ({pattern}).*"
    tritons = [re.escape(f"'{name}'") for name, values in bad.items() if not values]
    assert re.fullmatch(ours, message) or any(re.search(name, message) for name in tritons), message


@pytest.mark.parametrize(("bad", "pattern"), [*BAD_VALUES.values(), *NOT_UTF_8.values()], ids=[*BAD_VALUES, *NOT_UTF_8])
def test_a_bad_value_is_refused_and_the_next_good_request_works(call_tensors, bad, pattern):
    _check_refusal(_refusal(call_tensors, _tensors(GOOD | bad)), pattern, bad)
    assert call_tensors(_tensors(GOOD)).shape == (1, NUM_SAMPLES)


@pytest.mark.parametrize(("bad", "pattern"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_generate_refuses_a_bad_value_and_the_next_good_request_works(generate, bad, pattern):
    _check_refusal(_refusal(generate, GOOD | bad), pattern, bad)
    assert generate(GOOD).shape == (1, NUM_SAMPLES)


@pytest.mark.parametrize("name", INPUT_TYPES)
def test_a_tensor_of_another_type_is_refused(call_tensors, name):
    own = INPUT_TYPES[name][0]
    others = {"FP64": np.float64, "INT32": np.int32, "INT64": np.int64, "BYTES": np.object_}
    for datatype, dtype in others.items():
        if datatype != own:
            value = "1" if datatype == "BYTES" else 1
            wrong = (name, [value], datatype, dtype, (1,))
            message = _refusal(call_tensors, [*_tensors({k: v for k, v in GOOD.items() if k != name}), wrong])
            assert f"'{name}' data-type is '{datatype}', but model 'audioldm2' expects '{own}'" in message
    assert call_tensors(_tensors(GOOD)).shape == (1, NUM_SAMPLES)


@pytest.mark.parametrize("name", INPUT_TYPES)
def test_a_tensor_of_another_shape_is_refused(call_tensors, name):
    is_list = name in ("prompt", "negative_prompt")
    good = {"prompt": "a", "negative_prompt": "a", "scheduler": "DDIMScheduler", "audio_length_in_s": 0.04}.get(name, 1)
    for shape in [(1, 1), (), *([] if is_list else [(0,), (2,)])]:
        wrong = (name, [good] * int(np.prod(shape)), *INPUT_TYPES[name], shape)
        message = _refusal(call_tensors, [*_tensors({k: v for k, v in GOOD.items() if k != name}), wrong])
        assert (
            f"unexpected shape for input '{name}' for model 'audioldm2'. Expected [{-1 if is_list else 1}]" in message
        )
    assert call_tensors(_tensors(GOOD)).shape == (1, NUM_SAMPLES)


@pytest.mark.parametrize("name", INPUT_TYPES)
def test_generate_refuses_json_of_another_type(generate, name):
    for value in (None, True, {"a": 1}, 1 if INPUT_TYPES[name][0] == "BYTES" else "1"):
        assert "parse" in _refusal(generate, GOOD | {name: value})
    assert generate(GOOD).shape == (1, NUM_SAMPLES)


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{", b"\0", b'{"prompt": "\\ud800"}', b'{"prompt": "a",}'])
def test_generate_refuses_what_is_no_json_object(triton, generate, body):
    request = urllib.request.Request(f"http://{triton.http_url}/v2/models/audioldm2/generate", data=body)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    with caught.value as error:
        assert error.code in (400, 500)
        assert "JSON" in json.loads(error.read())["error"] or body in (b"[]", b"null")
    assert generate(GOOD).shape == (1, NUM_SAMPLES)


def test_generate_refuses_bytes_that_are_not_utf_8(triton, generate):
    body = b'{"prompt": "a\xff", "num_inference_steps": 1, "audio_length_in_s": 0.04}'
    with pytest.raises(BadRequestError, match=r"\[INVALID_ARG\] the body must be UTF-8, and byte 13 of it isn't\."):
        _generate(triton.http_url, body)
    assert generate(GOOD).shape == (1, NUM_SAMPLES)


def test_a_request_without_a_prompt_is_refused(call_tensors, generate):
    for inputs in ({}, {"seed": [7]}, {"num_inference_steps": [1], "audio_length_in_s": [0.04]}):
        for message in (_refusal(call_tensors, _tensors(inputs)), _refusal(generate, inputs)):
            _check_refusal(message, "prompt is missing: describe the sound in it.", {})
    assert "prompt is missing" in _refusal(generate, {"text": "a misspelt name", "seed": 7})
    assert call_tensors(_tensors(GOOD)).shape == (1, NUM_SAMPLES)


def test_unknown_and_repeated_inputs_are_refused(call_tensors):
    unknown = ("volume", [1], "INT32", np.int32, (1,))
    assert "unexpected inference input 'volume'" in _refusal(call_tensors, [*_tensors(GOOD), unknown])
    message = _refusal(call_tensors, [*_tensors(GOOD), *_tensors({"seed": [8]})])
    assert "input 'seed' already exists" in message
    assert call_tensors(_tensors(GOOD)).shape == (1, NUM_SAMPLES)


def _length(number: int) -> bytes:
    return struct.pack("<I", number)


@pytest.mark.parametrize(
    ("name", "shape", "content"),
    [
        ("prompt", [1], b""),
        ("prompt", [1], b"abc"),
        ("prompt", [1], _length(2**31)),
        ("prompt", [1], _length(2**32 - 1) + b"a"),
        ("prompt", [1], _length(1) + b"a" + _length(1) + b"b"),
        ("prompt", [1], _length(1) + b"azz"),
        ("prompt", [2], _length(1) + b"a"),
        ("prompt", [-1], _length(1) + b"a"),
        ("prompt", [2**62], _length(1) + b"a"),
        ("scheduler", [1], _length(2**32 - 1)),
        ("num_inference_steps", [1], b""),
        ("num_inference_steps", [1], b"\1"),
        ("num_inference_steps", [1], b"\1\0\0\0\1\0\0\0"),
        ("num_inference_steps", [-1], b"\1\0\0\0"),
    ],
)
def test_contents_that_do_not_fit_their_shape_are_refused(triton, grpc_client, name, shape, content):
    inputs = {"prompt": ([1], _length(1) + b"a"), "num_inference_steps": ([1], b"\1\0\0\0")} | {name: (shape, content)}
    message = service_pb2.ModelInferRequest(model_name="audioldm2")
    for key, (dims, raw) in inputs.items():
        message.inputs.add(name=key, datatype=INPUT_TYPES[key][0], shape=dims)
        message.raw_input_contents.append(raw)
    with grpc.insecure_channel(triton.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ModelInfer(message, timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert f"input '{name}'" in caught.value.details()
    tensors = [_as_tensor(tritonclient.grpc, *tensor) for tensor in _tensors(GOOD)]
    assert _infer(grpc_client, tensors).shape == (1, NUM_SAMPLES)
