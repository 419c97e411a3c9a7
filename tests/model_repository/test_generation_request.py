"""The public inputs: defaults, bounds, and the sentence for each that is out of bounds."""

from pathlib import Path

import numpy as np
import pytest
from audio_geometry import AudioGeometry
from config_parameters import ConfigParameters
from generation_request import GenerationRequest, InvalidInputError, Limits, parse_request
from scheduler_names import ALIASES, SchedulerChoice, SchedulerNames

from tests.helpers.triton_configs import read_parameters

GEOMETRY = AudioGeometry(16_000, 160, 64, 4, 8, 256)
PARAMETERS = read_parameters("tokenizer")
SCHEDULERS = SchedulerNames(["DDIMScheduler", "DPMSolverMultistepScheduler"])
LIMITS = Limits.from_parameters(ConfigParameters(PARAMETERS))


def parse(prompt=b"a dog", **inputs) -> GenerationRequest:
    types = {
        "num_inference_steps": np.int32,
        "num_waveforms_per_prompt": np.int32,
        "seed": np.int64,
        "guidance_scale": np.float32,
        "guidance_start": np.float32,
        "guidance_end": np.float32,
        "audio_length_in_s": np.float32,
        "eta": np.float32,
    }
    tensors = {"prompt": prompt, **inputs}
    return parse_request(
        {
            name: np.array(value if isinstance(value, list) else [value], types.get(name, np.object_))
            for name, value in tensors.items()
        },
        GEOMETRY,
        SCHEDULERS,
        LIMITS,
    )


def test_a_missing_prompt_is_refused_whatever_else_is_there():
    for inputs in ({}, {"seed": np.array([7])}):
        with pytest.raises(InvalidInputError, match=r"\[INVALID_ARG\] prompt is missing: describe the sound in it\."):
            parse_request(inputs, GEOMETRY, SCHEDULERS, LIMITS)


def test_defaults_are_those_of_the_contract():
    request = parse()
    assert request.prompts == ("a dog",)
    assert request.negative_prompts is None
    assert request.num_inference_steps == 20
    assert request.guidance_scale == 3.5
    assert (request.guidance_start, request.guidance_end) == (0.0, 1.0)
    assert request.audio_length_in_s == 10.24
    assert request.num_waveforms_per_prompt == 1
    assert request.scheduler == SchedulerChoice("DPMSolverMultistepScheduler")
    assert request.eta == 0


def test_drawn_seeds_differ_and_are_short():
    seeds = {parse().seed for _ in range(20)}
    assert len(seeds) == 20
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_a_length_means_the_decimal_that_the_client_wrote():
    assert parse(audio_length_in_s=5.1).audio_length_in_s == 5.1


def test_an_interval_of_guidance_means_the_decimals_that_the_client_wrote():
    # 0.7 as FP32 is less than 0.7: the last of its ten steps would be lost.
    request = parse(guidance_start=0.1, guidance_end=0.7)
    assert (request.guidance_start, request.guidance_end) == (0.1, 0.7)


def test_one_negative_prompt_is_for_all_prompts():
    assert parse([b"a", b"b"], negative_prompt=b"c").negative_prompts == ("c", "c")
    assert parse([b"a", b"b"], negative_prompt=[b"c", b"d"]).negative_prompts == ("c", "d")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompt": b""}, "[INVALID_ARG] prompt 0 of 1 is blank: describe the sound in it."),
        ({"prompt": [b"a", b" \n"]}, "[INVALID_ARG] prompt 1 of 2 is blank: describe the sound in it."),
        ({"prompt": []}, "[INVALID_ARG] prompt is out of bounds: the number of prompts must be finite"),
        ({"prompt": [b"a"] * 17}, "between 1 and 16, got 17."),
        ({"prompt": b"\xff"}, "[INVALID_ARG] prompt must be UTF-8, and byte 0 of it isn't."),
        ({"prompt": b"a" * 16_385}, "the number of bytes must be finite and between 0 and 16384, got 16385."),
        ({"negative_prompt": [b"a", b"b"]}, "[INVALID_ARG] negative_prompt must hold 1 text or as many"),
        ({"negative_prompt": b"\xff"}, "[INVALID_ARG] negative_prompt must be UTF-8"),
        ({"num_inference_steps": 0}, "[INVALID_ARG] num_inference_steps is out of bounds: it must be finite and"),
        ({"num_inference_steps": 1001}, "between 1 and 1000, got 1001."),
        ({"num_inference_steps": -1}, "got -1."),
        ({"guidance_scale": np.nan}, "[INVALID_ARG] guidance_scale is out of bounds: it must be finite and at least 0"),
        ({"guidance_scale": np.inf}, "got inf."),
        ({"guidance_scale": -1}, "got -1.0."),
        (
            {"guidance_start": -0.1},
            "[INVALID_ARG] guidance_start is out of bounds: it must be finite and between 0 and 1, got -0.1.",
        ),
        ({"guidance_start": 1.5}, "got 1.5."),
        ({"guidance_start": np.nan}, "[INVALID_ARG] guidance_start is out of bounds"),
        (
            {"guidance_end": 1.1},
            "[INVALID_ARG] guidance_end is out of bounds: it must be finite and between 0 and 1, got 1.1.",
        ),
        ({"guidance_end": -1}, "got -1.0."),
        ({"guidance_end": np.inf}, "[INVALID_ARG] guidance_end is out of bounds"),
        (
            {"guidance_start": 0.8, "guidance_end": 0.4},
            "[INVALID_ARG] guidance_start must be less than guidance_end (0.4), got 0.8.",
        ),
        ({"guidance_start": 0.4, "guidance_end": 0.4}, "must be less than guidance_end (0.4), got 0.4."),
        ({"guidance_start": 1}, "must be less than guidance_end (1.0), got 1.0."),
        ({"guidance_end": 0}, "must be less than guidance_end (0.0), got 0.0."),
        ({"guidance_scale": 1, "guidance_end": 0}, "must be less than guidance_end (0.0), got 0.0."),
        ({"audio_length_in_s": 0}, "[INVALID_ARG] audio_length_in_s is out of bounds: it must be finite and between"),
        ({"audio_length_in_s": 0.03}, "between 0.04 and 160, got 0.03."),
        ({"audio_length_in_s": 161}, "got 161.0."),
        ({"audio_length_in_s": np.nan}, "got nan."),
        ({"num_waveforms_per_prompt": 0}, "[INVALID_ARG] num_waveforms_per_prompt is out of bounds"),
        ({"num_waveforms_per_prompt": 17}, "between 1 and 16, got 17."),
        ({"seed": -1}, "[INVALID_ARG] seed is out of bounds"),
        (
            {"scheduler": b"nothing"},
            "[INVALID_ARG] scheduler must be one of DDIMScheduler, DPMSolverMultistepScheduler, d",
        ),
        ({"scheduler": b"euler"}, "got 'euler'."),
        ({"eta": 1.5}, "[INVALID_ARG] eta is out of bounds: it must be finite and between 0 and 1, got 1.5."),
        (
            {"num_waveforms_per_prompt": 5, "audio_length_in_s": 150},
            "[INVALID_ARG] audio_length_in_s is out of bounds: 1 prompts x 5 waveforms x 150 s must be at most 640 s",
        ),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_bound(inputs, message):
    with pytest.raises(InvalidInputError) as caught:
        parse(**inputs)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": "1"}, "unknown parameter max_length"),
        ({"max_num_prompts": "many"}, "max_num_prompts must be a positive whole number, got 'many'"),
        ({"max_num_prompts": "0"}, "max_num_prompts must be a positive whole number, got '0'"),
        ({"max_num_prompts": "1.5"}, "max_num_prompts must be a positive whole number, got '1.5'"),
        ({"max_audio_length_in_s": "inf"}, "max_audio_length_in_s must be a positive, finite number, got 'inf'"),
        ({"max_audio_length_in_s": "nan"}, "max_audio_length_in_s must be a positive, finite number, got 'nan'"),
        ({"max_audio_length_in_s": "-1"}, "max_audio_length_in_s must be a positive, finite number, got '-1'"),
        ({"max_audio_length_in_s": "ten"}, "max_audio_length_in_s must be a positive, finite number, got 'ten'"),
    ],
)
def test_a_bad_parameter_in_the_configuration_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        Limits.from_parameters(ConfigParameters(PARAMETERS | change))


def test_a_missing_parameter_in_the_configuration_is_named():
    with pytest.raises(ValueError, match="max_prompt_bytes is missing"):
        Limits.from_parameters(
            ConfigParameters({key: value for key, value in PARAMETERS.items() if key != "max_prompt_bytes"})
        )


def test_an_alias_is_a_class_with_options():
    assert parse(scheduler=b"DDIMScheduler").scheduler == parse(scheduler=b"ddim").scheduler
    assert parse(scheduler=b"dpm++2m-sde-karras").scheduler == SchedulerChoice(
        "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True}
    )


def test_every_alias_is_in_the_documented_table():
    table = (Path(__file__).parents[2] / "docs" / "contract.md").read_text()
    for alias, (name, options) in ALIASES.items():
        settings = ", ".join(f"`{key}={value}`" for key, value in sorted(options.items())) or "-"
        assert f"| `{alias}` | `{name}` | {settings} |" in table
