"""The JSON between tokenizer and unet: what one writes, the other reads, and each wrong option is named."""

import dataclasses
import json

import pytest
import torch
from audio_geometry import AudioGeometry
from denoising_errors import InvalidRequestError
from denoising_request import DenoisingRequest, SchedulerRequest
from generation_request import GenerationRequest
from scheduler_names import SchedulerChoice

from tests.helpers.tiny_unet import denoising_options, make_request

GEOMETRY = AudioGeometry(16_000, 160, 64, 4, 8, 256)
TEXT = (torch.zeros(2, 8, 12), torch.zeros(2, 7, 20), torch.ones(2, 7, dtype=torch.int64))
VALID = json.loads(denoising_options(make_request(seed=2**63 - 1)))


def read(options: str) -> DenoisingRequest:
    return DenoisingRequest.from_options(*TEXT, options.encode())


def test_the_unet_reads_what_the_tokenizer_writes():
    generation = GenerationRequest(
        prompts=("a dog", "a cat"),
        audio_length_in_s=5.1,
        num_inference_steps=33,
        guidance_scale=2.7,
        guidance_start=0.1,
        guidance_end=0.7,
        num_waveforms_per_prompt=3,
        seed=2**63 - 1,
        scheduler=SchedulerChoice("DDIMScheduler", {"b": "text", "a": True}),
        eta=0.3,
    )
    request = read(generation.denoising_options(GEOMETRY))
    assert request.latents_shape == (6, 8, 128, 16)
    assert request.guidance_scale == 2.7, "the decimal that the client wrote"
    assert (request.guidance_start, request.guidance_end) == (0.1, 0.7)
    assert request.scheduler == SchedulerRequest("DDIMScheduler", (("a", True), ("b", "text")), 33, 0.3, 2**63 - 1)


@pytest.mark.parametrize(("scale", "guided"), [(0.0, False), (1.0, False), (1.0000001, True), (3.5, True)])
def test_the_tokenizer_decides_whether_there_is_guidance(scale, guided):
    generation = GenerationRequest(("a dog",), 10.24, guidance_scale=scale)
    assert generation.do_classifier_free_guidance == guided
    assert read(generation.denoising_options(GEOMETRY)).do_classifier_free_guidance == guided


def test_without_guidance_an_interval_of_it_changes_nothing():
    generation = GenerationRequest(("a dog",), 10.24, guidance_scale=1.0, guidance_start=0.2, guidance_end=0.8)
    request = read(generation.denoising_options(GEOMETRY))
    assert not any(request.is_guided(forward, 20) for forward in range(20))


def test_every_setting_of_the_request_that_the_unet_needs_has_an_effect():
    base = GenerationRequest(("a dog",), 10.24, seed=1)
    changes = {
        "audio_length_in_s": 5.0,
        "num_inference_steps": 21,
        "guidance_scale": 3.6,
        "guidance_start": 0.1,
        "guidance_end": 0.9,
        "num_waveforms_per_prompt": 2,
        "seed": 2,
        "scheduler": SchedulerChoice("DDIMScheduler"),
        "eta": 0.1,
    }
    unchanged = {field.name for field in dataclasses.fields(base)} - changes.keys()
    assert unchanged == {"prompts", "negative_prompts"}, "they are tokenized"
    written = {
        dataclasses.replace(base, **{name: value}).denoising_options(GEOMETRY) for name, value in changes.items()
    }
    assert len(written | {base.denoising_options(GEOMETRY)}) == len(changes) + 1


@pytest.mark.parametrize("text", [b"{", b"\xff{}", b"", b"[" * 100_000], ids=["open", "not UTF-8", "empty", "deep"])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(InvalidRequestError, match=r"^denoising_options must be JSON in UTF-8: "):
        DenoisingRequest.from_options(*TEXT, text)


@pytest.mark.parametrize("text", ["[]", "1", "null", '"{}"'])
def test_what_is_no_object_is_refused(text):
    with pytest.raises(InvalidRequestError, match=r"^denoising_options must be a JSON object, got "):
        read(text)


@pytest.mark.parametrize("name", VALID)
def test_a_missing_option_is_named(name):
    with pytest.raises(InvalidRequestError, match=f"^denoising_options has no {name}.$"):
        read(json.dumps({key: value for key, value in VALID.items() if key != name}))


def test_an_unknown_option_is_named_with_those_that_are_known():
    with pytest.raises(InvalidRequestError, match=r"has the unknown option 'steps'; known are latents_shape, .*seed"):
        read(json.dumps(VALID | {"steps": 4}))


WRONG = {
    "three sizes": ("latents_shape", "[1, 8, 16]", r"a list of 4 whole numbers, got \[1, 8, 16\]"),
    "a size that isn't whole": ("latents_shape", "[1, 8, 1.5, 16]", "a list of 4 whole numbers"),
    "a size that is true": ("latents_shape", "[true, 8, 16, 16]", "a list of 4 whole numbers"),
    "a number for the sizes": ("latents_shape", "4", "a list of 4 whole numbers, got 4"),
    "a text for the guidance": ("guidance_scale", '"3.5"', 'a finite number, got "3.5"'),
    "guidance that is NaN": ("guidance_scale", "NaN", "a finite number, got NaN"),
    "infinite guidance": ("guidance_scale", "1e999", "a finite number, got Infinity"),
    "guidance beyond a float": ("guidance_scale", "1" + "0" * 400, "a finite number, got 1000"),
    "a text for the interval": ("guidance_start", '"0"', 'a finite number, got "0"'),
    "an interval that ends nowhere": ("guidance_end", "null", "a finite number, got null"),
    "no eta": ("eta", "null", "a finite number, got null"),
    "eta that is true": ("eta", "true", "a finite number, got true"),
    "a number for the scheduler": ("scheduler", "1", "a text, got 1"),
    "half a step": ("num_inference_steps", "1.5", "a whole number, got 1.5"),
    "true steps": ("num_inference_steps", "true", "a whole number, got true"),
    "a seed that is a text": ("seed", '"7"', 'a whole number, got "7"'),
    "scheduler options that are a list": ("scheduler_options", "[]", "a JSON object whose values are "),
    "a large scheduler option": ("scheduler_options", '{"num_train_timesteps": 1001}', "a JSON object .* to 1000"),
    "a scheduler option that is NaN": ("scheduler_options", '{"beta_start": NaN}', "a JSON object .* to 1000"),
    "a nested scheduler option": ("scheduler_options", '{"trained_betas": [1]}', "a JSON object .* to 1000"),
}


@pytest.mark.parametrize(("name", "value", "problem"), WRONG.values(), ids=WRONG)
def test_an_option_of_another_kind_is_named_with_what_it_must_be(name, value, problem):
    others = "".join(f', "{key}": {json.dumps(other)}' for key, other in VALID.items() if key != name)
    with pytest.raises(InvalidRequestError, match=f"^{name} must be {problem}"):
        read(f'{{"{name}": {value}{others}}}')


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("num_inference_steps", 0, "1 and 10000"),
        ("num_inference_steps", -1, "1 and 10000"),
        ("num_inference_steps", 10_001, "1 and 10000"),
        ("seed", -1, "0 and 9223372036854775807"),
        ("seed", 2**63, "0 and 9223372036854775807"),
    ],
)
def test_a_whole_number_out_of_bounds_is_named_with_its_bounds(name, value, bounds):
    with pytest.raises(InvalidRequestError, match=f"^{name} is out of bounds: .* between {bounds}, got {value}"):
        read(json.dumps(VALID | {name: value}))


@pytest.mark.parametrize("name", ["guidance_start", "guidance_end"])
@pytest.mark.parametrize("value", [-0.1, 1.1])
def test_an_end_of_the_interval_out_of_bounds_is_named_with_its_bounds(name, value):
    with pytest.raises(InvalidRequestError, match=f"^{name} is out of bounds: .* between 0 and 1, got {value}"):
        read(json.dumps(VALID | {name: value}))
