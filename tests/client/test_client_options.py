"""The one list of options agrees with the server, with the clients' signatures and with the guide."""

import inspect
from dataclasses import MISSING, fields

import numpy as np
import pytest
from audio_geometry import AudioGeometry
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client, GenerationOptions
from audioldm2_client._options import OPTIONS, SCHEDULER_ALIASES, Option, lists_options
from config_parameters import ConfigParameters
from generation_request import DEFAULT_SCHEDULER, GenerationRequest, InvalidInputError, Limits, parse_request
from scheduler_names import ALIASES, SchedulerNames

from tests.helpers.document_examples import ROOT
from tests.helpers.triton_configs import INPUT_TYPES, read_configs, read_parameters, signature

OFFICIAL = AudioGeometry(
    sampling_rate=16000,
    hop_length=160,
    num_mel_bins=64,
    vae_scale_factor=4,
    num_latent_channels=8,
    default_num_latent_frames=256,
)
CONFIGS = read_configs()
LIMITS = Limits.from_parameters(ConfigParameters(read_parameters("tokenizer")))
BOUNDS = [
    (name, bound, sign)
    for name, option in OPTIONS.items()
    for bound, sign in ((option.minimum, -1), (option.maximum, 1))
    if bound is not None
]

EMPTY_INTERVALS = [("guidance_start", 1), ("guidance_end", 0)]
"""Bounds that no request can have, beside the other end's default: an end is at least above 0, a start below 1."""


def parse_with(name: str, value: float) -> GenerationRequest:
    dtype = INPUT_TYPES[name][1]
    inputs = {"prompt": np.array([b"a dog"], np.object_), name: np.array([value], dtype)}
    return parse_request(inputs, OFFICIAL, SchedulerNames([name for name, _ in ALIASES.values()]), LIMITS)


def test_options_are_the_optional_inputs_of_the_ensemble():
    inputs = signature(CONFIGS["audioldm2"].input)
    tensors = {
        name: (f"TYPE_{option.datatype.replace('BYTES', 'STRING')}", (-1 if option.one_per_prompt else 1,))
        for name, option in OPTIONS.items()
    }
    assert inputs == {"prompt": ("TYPE_STRING", (-1,)), **tensors}


def test_defaults_are_those_of_the_server():
    served = {
        field.name: f"{field.default:g}"
        for field in fields(GenerationRequest)
        if isinstance(field.default, (int, float)) and field.default is not MISSING
    }
    served |= {
        "audio_length_in_s": f"{OFFICIAL.default_audio_length_in_s:g}",
        "scheduler": DEFAULT_SCHEDULER.class_name,
        "negative_prompt": "none",
        "seed": "random",
    }
    assert {name: option.default for name, option in OPTIONS.items()} == served


@pytest.mark.parametrize(("name", "bound", "sign"), BOUNDS)
def test_bounds_are_those_of_the_server(name, bound, sign):
    beyond = bound + sign * (1 if OPTIONS[name].python_type is int else 1e-3)
    with pytest.raises(InvalidInputError, match=f"{name} is out of bounds"):
        parse_with(name, beyond)
    if (name, bound) in EMPTY_INTERVALS:
        with pytest.raises(InvalidInputError, match="guidance_start must be less than guidance_end"):
            parse_with(name, bound)
    else:
        assert parse_with(name, bound)


@pytest.mark.parametrize("name", [n for n, option in OPTIONS.items() if option.minimum is not None])
def test_option_without_a_maximum_has_only_that_of_its_type(name):
    if OPTIONS[name].maximum is None:
        dtype = INPUT_TYPES[name][1]
        assert parse_with(name, (np.iinfo if OPTIONS[name].python_type is int else np.finfo)(dtype).max)


def test_aliases_are_those_of_the_server():
    assert tuple(ALIASES) == SCHEDULER_ALIASES


@pytest.mark.parametrize("client", [AudioLDM2Client, AsyncAudioLDM2Client])
@pytest.mark.parametrize("method", ["generate", "submit"])
def test_signature_and_help_show_every_option(client, method):
    function = getattr(client, method)
    shown = inspect.signature(function).parameters
    assert list(shown)[-len(OPTIONS) :] == list(OPTIONS)
    assert shown["seed"].annotation == int | None
    for name, option in OPTIONS.items():
        assert f"{name}: {option.meaning}" in function.__doc__
    assert "**options" not in function.__doc__


def test_functions_without_a_docstring_keep_their_signature():
    """As under `python -OO`."""

    def function(prompt, **options): ...

    assert list(inspect.signature(lists_options(function)).parameters) == ["prompt", *OPTIONS]


def test_every_option_is_described_and_named_once():
    assert GenerationOptions.__optional_keys__ == OPTIONS.keys()
    for attribute in ("flag", "meaning"):
        assert len({getattr(option, attribute) for option in OPTIONS.values()}) == len(OPTIONS)


def guide_rows(name: str, option: Option) -> list[str]:
    """The lines of `docs/client.md` that explain an option."""
    default = option.default if option.default.islower() or option.minimum is not None else f"`{option.default}`"
    ranges = f" {option.values} |" if option.values else " |"
    command_ranges = ranges if option.minimum is not None else " |"
    return [
        f"| `{name}` | {default} |{ranges} {option.meaning} |",
        f"| `{option.flag}` |{command_ranges} `{name}` |",
    ]


@pytest.mark.parametrize("name", OPTIONS)
def test_guide_has_the_options_rows(name):
    guide = (ROOT / "docs/client.md").read_text().splitlines()
    assert [row for row in guide_rows(name, OPTIONS[name]) if row not in guide] == []


def test_contract_has_the_options_types_and_defaults():
    contract = (ROOT / "docs/contract.md").read_text()
    for name, option in OPTIONS.items():
        shape = -1 if option.one_per_prompt else 1
        row = next(line for line in contract.splitlines() if line.startswith(f"| `{name}` |")).split("|")
        assert row[2].strip() == f"{option.datatype} `[{shape}]`"
        assert option.default in row[3] or option.default == "random", name
