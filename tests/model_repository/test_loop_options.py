"""The parameters of the model `unet`: what is committed, and the sentence for each that is wrong."""

from pathlib import Path

import pytest
import torch
from config_parameters import ConfigParameters
from loop_options import LoopOptions
from unet_shapes import AUTO, FixedShape, Preparation

from export.checkpoint_schemas import MAX_TEXT_TOKENS
from tests.helpers.triton_configs import read_parameters

PARAMETERS = read_parameters("unet")


def parse(**changes: str) -> LoopOptions:
    return LoopOptions.from_parameters(ConfigParameters(PARAMETERS | changes))


def test_what_is_committed_leaves_the_device_its_choice_and_room_for_the_longest_text():
    options = parse()
    cache_folder = Path.home() / ".cache" / "audioldm2-triton" / "inductor"
    assert options.preparation == Preparation(AUTO, AUTO, None, cache_folder)
    assert options.dtype == AUTO
    assert options.text_buckets[-1] == MAX_TEXT_TOKENS


def test_every_parameter_reaches_its_option(monkeypatch):
    monkeypatch.setenv("CACHES", "/caches")
    options = parse(
        max_rows="7",
        max_queue_size="9",
        queue_timeout_s="60",
        max_frames_per_forward="100",
        max_latent_frames="200",
        text_buckets="8, 24,25",
        poll_interval_ms="20",
        drain_timeout_s="3",
        dtype="bf16",
        fixed_shapes="2x256x16",
        compile_backend="inductor",
        cuda_graphs="on",
        compile_cache="$CACHES/unet",
    )
    assert options == LoopOptions(
        max_rows=7,
        max_queue_size=9,
        queue_timeout_s=60.0,
        frames_per_forward=100,
        max_latent_frames=200,
        text_buckets=(8, 24, 25),
        poll_interval_s=0.02,
        drain_timeout_s=3.0,
        dtype="bf16",
        preparation=Preparation("inductor", "on", (FixedShape(2, 256, 16),), Path("/caches/unet")),
    )


def test_an_empty_cache_folder_is_none():
    assert parse(compile_cache="").preparation.cache_folder is None


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("", ()),
        (" ,", ()),
        ("2x256x16", ((2, 256, 16),)),
        # The smallest first, each once.
        (
            "16x256x64, 2x512x16,2x256x128 ,2x256x16,16x256x64",
            ((2, 256, 16), (2, 256, 128), (2, 512, 16), (16, 256, 64)),
        ),
    ],
)
def test_fixed_shapes_are_sorted_and_each_is_there_once(text, shapes):
    assert parse(fixed_shapes=text).preparation.fixed_shapes == tuple(FixedShape(*shape) for shape in shapes)


@pytest.mark.parametrize("text", ["2x256x16", "16x1x512"])
def test_a_fixed_shape_is_written_as_it_is_read(text):
    assert str(parse(fixed_shapes=text).preparation.fixed_shapes[0]) == text


@pytest.mark.parametrize(
    ("parameter", "device", "frames"),
    [("auto", "cpu", 4096), ("auto", "cuda", 16_384), ("512", "cpu", 512), ("512", "cuda", 512)],
)
def test_the_budget_of_a_forward_depends_on_the_device_unless_it_is_given(parameter, device, frames):
    assert parse(max_frames_per_forward=parameter).max_frames_per_forward(torch.device(device)) == frames


COUNTS = (
    "max_rows",
    "max_queue_size",
    "queue_timeout_s",
    "max_frames_per_forward",
    "max_latent_frames",
    "text_buckets",
    "poll_interval_ms",
    "drain_timeout_s",
)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("text", ["0", "-1", "many", "", "1.5", "1e3", "²", "1_000"])
def test_what_is_not_a_positive_whole_number_is_refused(name, text):
    with pytest.raises(ValueError, match=f"parameter {name} must be a positive whole number, got '{text}'"):
        parse(**{name: text})


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("max_rows", "auto", "must be a positive whole number, got 'auto'"),
        ("text_buckets", "16,8", "must be in rising order, got '16,8'"),
        ("text_buckets", "16,16", "must be in rising order, got '16,16'"),
        ("text_buckets", "16,,32", "must be a positive whole number, got ''"),
        ("fixed_shapes", "2x256", "must be ROWSxFRAMESxTOKENS, got '2x256'"),
        ("fixed_shapes", "2x256x16x1", "must be ROWSxFRAMESxTOKENS, got '2x256x16x1'"),
        ("fixed_shapes", "2x256x16,2x0x16", "must be a positive whole number, got '0'"),
        ("fixed_shapes", "2x256x-16", "must be a positive whole number, got '-16'"),
        ("fixed_shapes", "all", "must be a positive whole number, got 'all'"),
        ("fixed_shapes", "2X256X16", "must be a positive whole number, got '2X256X16'"),
        ("dtype", "float32", "must be one of auto, as_exported, fp32, fp16, bf16, got 'float32'"),
        ("dtype", "", "must be one of auto, as_exported, fp32, fp16, bf16, got ''"),
        ("cuda_graphs", "true", "must be one of auto, on, off, got 'true'"),
    ],
)
def test_a_bad_value_is_refused_with_what_is_wrong(name, text, problem):
    with pytest.raises(ValueError, match=f"parameter {name} {problem}"):
        parse(**{name: text})


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_missing_parameter_is_named(name):
    with pytest.raises(ValueError, match=f"parameter {name} is missing"):
        LoopOptions.from_parameters(ConfigParameters({k: v for k, v in PARAMETERS.items() if k != name}))


def test_an_unknown_parameter_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match=r"unknown parameter max_row; known are max_rows, .*compile_cache"):
        parse(max_row="1")
