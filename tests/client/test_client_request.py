"""What is put on the wire, and what is refused before."""

import numpy as np
import pytest
from audioldm2_client import InvalidRequestError
from audioldm2_client._request import InferenceRequest, build_request


def build(prompt="a dog", timeout_s: float = 1.5, **options) -> InferenceRequest:
    return build_request(prompt, options, model_name="audioldm2", request_id="r1", timeout_s=timeout_s)


def test_only_given_inputs_are_sent():
    assert [tensor.name for tensor in build().inputs] == ["prompt"]
    assert [tensor.name for tensor in build(seed=0, eta=0.0, scheduler=None).inputs] == ["prompt", "seed", "eta"]


def test_unknown_option_is_named_with_the_known_ones():
    with pytest.raises(TypeError, match=r"unknown option 'steps'; the options are negative_prompt, .*eta$"):
        build(steps=20)


@pytest.mark.parametrize(
    ("name", "value", "datatype", "expected"),
    [
        ("negative_prompt", "low quality", "BYTES", [b"low quality"]),
        ("negative_prompt", ["a", "b"], "BYTES", [b"a", b"b"]),
        ("num_inference_steps", 20, "INT32", [20]),
        ("num_inference_steps", np.int64(20), "INT32", [20]),
        ("guidance_scale", 3.5, "FP32", [3.5]),
        ("guidance_scale", 3, "FP32", [3.0]),
        ("guidance_start", 0.25, "FP32", [0.25]),
        ("guidance_end", 1, "FP32", [1.0]),
        ("audio_length_in_s", np.float32(5.0), "FP32", [5.0]),
        ("num_waveforms_per_prompt", 4, "INT32", [4]),
        ("seed", 2**63 - 1, "INT64", [2**63 - 1]),
        ("scheduler", "DDIMScheduler", "BYTES", [b"DDIMScheduler"]),
        ("eta", 1.0, "FP32", [1.0]),
    ],
)
def test_option_becomes_its_tensor(name, value, datatype, expected):
    tensor = build(**{name: value}).inputs[1]
    assert (tensor.name, tensor.datatype, tensor.data.tolist()) == (name, datatype, expected)


def test_prompts_are_utf8_one_element_each():
    request = build(["ein Hund", "犬の鳴き声 \0"])
    assert request.inputs[0].data.tolist() == [b"ein Hund", "犬の鳴き声 \0".encode()]
    assert request.prompts == ("ein Hund", "犬の鳴き声 \0")


@pytest.mark.parametrize("options", [{"num_inference_steps": -5}, {"seed": -1}, {"guidance_scale": float("nan")}])
def test_bounds_are_left_to_the_server(options):
    assert len(build(**options).inputs) == 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompt": []}, "prompt must hold at least one text; got an empty sequence"),
        ({"negative_prompt": []}, "negative_prompt must hold at least one text"),
        ({"prompt": "\ud800"}, "prompt must be Unicode text"),
        ({"seed": 2**63}, "seed must fit in a 64-bit signed integer; got 9223372036854775808"),
        ({"num_inference_steps": 2**31}, "num_inference_steps must fit in a 32-bit signed integer"),
        ({"guidance_scale": 1e300}, "guidance_scale must fit in a 32-bit float"),
        ({"guidance_scale": -(10**400)}, "guidance_scale must fit in a 32-bit float"),
    ],
)
def test_what_the_wire_cannot_carry_is_an_invalid_request(options, sentence):
    with pytest.raises(InvalidRequestError, match=sentence):
        build(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": 3},
        {"prompt": b"bytes"},
        {"prompt": ["a", None]},
        {"prompt": None},
        {"num_inference_steps": 20.0},
        {"num_inference_steps": True},
        {"seed": "7"},
        {"guidance_scale": "3.5"},
        {"scheduler": ["DDIMScheduler"]},
        {"timeout_s": "1"},
    ],
)
def test_wrong_type_is_a_type_error(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be "):
        build(**options)


@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan")])
def test_timeout_must_be_positive_and_finite(timeout_s):
    with pytest.raises(ValueError, match="timeout_s must be a positive number of seconds"):
        build(timeout_s=timeout_s)


def test_timeout_is_told_in_whole_microseconds_and_never_as_none():
    assert build(timeout_s=1.5).timeout_us == 1_500_000
    assert build(timeout_s=1e-9).timeout_us == 1
