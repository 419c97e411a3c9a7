"""Odd checkpoints: what passes the export makes what diffusers makes; the rest is refused at once, in a sentence."""

import inspect
import json
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from generation_request import DEFAULT_SCHEDULER as DEFAULT_CHOICE
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint, CheckpointError
from export.checkpoint_loading import DEFAULT_SCHEDULER
from export.checkpoint_schemas import COMPONENT_CLASSES, MODELS, SCHEDULERS, SCHEMAS
from export.config_rules import OWN_DEFAULT, REQUIRED, Schema
from tests.helpers.tiny_checkpoint import config_file, copy_checkpoint, edit_json, replace

MAX_REFUSAL_S = 5.0

T5_ONLY = [[None, None, 96]] * 4
GPT2_ONLY = [[None, 64]] * 4


@dataclass(frozen=True)
class Refused:
    """A value that is refused.

    Attributes:
        component: Whose configuration it is in.
        key: With dots for sections.
        value: As in JSON.
        supported: What the sentence says is supported, a part of it.
        named: The key that the sentence is about, where that is another one, with its component.
    """

    component: str
    key: str
    value: Any
    supported: str
    named: tuple[str, str] | None = None

    def __str__(self) -> str:
        return f"{self.component}-{self.key}-{json.dumps(self.value)[:30]}"


WHOLE = "a whole number"
REFUSED = (
    # UNet
    Refused("unet", "sample_size", None, "a whole number of at least 1: the default length"),
    Refused("unet", "sample_size", [256, 16], WHOLE),
    Refused("unet", "sample_size", 0, WHOLE),
    Refused("unet", "sample_size", -256, WHOLE),
    Refused("unet", "sample_size", 256.0, WHOLE),
    Refused("unet", "sample_size", "256", WHOLE),
    Refused("unet", "sample_size", True, WHOLE),
    Refused("unet", "sample_size", float("nan"), WHOLE),
    Refused("unet", "cross_attention_dim", 64, "T5's states"),
    Refused("unet", "cross_attention_dim", [64] * 4, "T5's states"),
    Refused("unet", "cross_attention_dim", [[64]] * 4, "T5's states"),
    Refused("unet", "cross_attention_dim", GPT2_ONLY, "T5's states"),
    Refused("unet", "cross_attention_dim", T5_ONLY, "GPT-2's vectors"),
    Refused("unet", "cross_attention_dim", [[None, 64, 96], *[[None, 64, None]] * 3], "T5's states"),
    Refused("unet", "cross_attention_dim", [[None, 64, 96]] * 3, "a list of 4, as long as block_out_channels"),
    Refused("unet", "cross_attention_dim", [None, 64, 96, 96], "a list of up to 4 widths"),
    Refused("unet", "cross_attention_dim", [[None, 64, 96, 96, 96]] * 4, "a list of up to 4 widths"),
    Refused("unet", "cross_attention_dim", [], "a list of up to 4 widths"),
    Refused("unet", "down_block_types", ["DownBlock2D", "AttnDownBlock2D"] * 2, "DownBlock2D or CrossAttnDownBlock2D"),
    Refused("unet", "down_block_types", ["CrossAttnDownBlock2D"] * 3, "a list of 4"),
    Refused("unet", "up_block_types", ["UpBlock2D", "SimpleCrossAttnUpBlock2D"] * 2, "UpBlock2D or CrossAttnUpBlock2D"),
    Refused("unet", "mid_block_type", "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
    Refused("unet", "mid_block_type", None, "UNetMidBlock2DCrossAttn"),
    Refused("unet", "class_embed_type", "timestep", "null"),
    Refused("unet", "num_class_embeds", 10, "null"),
    Refused("unet", "class_embeddings_concat", True, "false"),
    Refused("unet", "num_attention_heads", 4, "null"),
    Refused("unet", "time_embedding_type", "fourier", "positional"),
    Refused("unet", "resnet_time_scale_shift", "ada_group", "default or scale_shift"),
    Refused("unet", "layers_per_block", [1, 1], "a list of 4"),
    Refused("unet", "layers_per_block", 0, WHOLE),
    Refused("unet", "attention_head_dim", [2, 2, 3], "a list of 4"),
    Refused("unet", "transformer_layers_per_block", [1], "a list of 4"),
    Refused("unet", "only_cross_attention", [False] * 5, "a list of 4"),
    Refused("unet", "norm_num_groups", None, WHOLE),
    Refused("unet", "block_out_channels", [64, 64, 96, 130], "multiples of 32"),
    Refused("unet", "in_channels", 4, "they must be equal"),
    Refused("unet", "out_channels", 16, "they must be equal"),
    Refused("unet", "conv_in_kernel", 4, "an odd whole number"),
    Refused("unet", "act_fn", "softsign", "silu"),
    # VAE
    Refused("vae", "scaling_factor", 0, "above 0"),
    Refused("vae", "scaling_factor", "0.41", "above 0"),
    Refused("vae", "scaling_factor", None, "above 0"),
    Refused("vae", "scaling_factor", float("nan"), "above 0"),
    Refused("vae", "scaling_factor", float("inf"), "above 0"),
    Refused("vae", "scaling_factor", True, "above 0"),
    Refused("vae", "out_channels", 3, "1, a spectrogram"),
    Refused("vae", "latent_channels", 16, "they must be equal", ("unet", "in_channels")),
    Refused(
        "vae",
        "block_out_channels",
        [32, 64, 96, 96],
        "a list of 4, as long as block_out_channels",
        ("vae", "down_block_types"),
    ),
    Refused("vae", "block_out_channels", 64, "a list"),
    Refused("vae", "block_out_channels", [], "a list"),
    Refused("vae", "up_block_types", ["UpDecoderBlock2D"] * 2, "a list of 3"),
    Refused("vae", "up_block_types", ["UpBlock2D"] * 3, "UpDecoderBlock2D"),
    Refused("vae", "norm_num_groups", 5, "multiples of 5", ("vae", "block_out_channels")),
    Refused("vae", "mid_block_add_attention", "no", "true or false"),
    Refused("vae", "use_post_quant_conv", 1, "true or false"),
    Refused("vae", "layers_per_block", [1, 1, 1], WHOLE),
    # Vocoder
    Refused("vocoder", "sampling_rate", 16000.0, WHOLE),
    Refused("vocoder", "sampling_rate", None, WHOLE),
    Refused("vocoder", "sampling_rate", 0, WHOLE),
    Refused("vocoder", "model_in_dim", 66, "a multiple of 4"),
    Refused("vocoder", "model_in_dim", "64", WHOLE),
    Refused("vocoder", "upsample_rates", [5, 4, 2, 2], "4 sizes", ("vocoder", "upsample_kernel_sizes")),
    Refused("vocoder", "upsample_rates", [], "a list"),
    Refused("vocoder", "upsample_rates", [5, 4, 2, 2, 0], WHOLE),
    Refused("vocoder", "upsample_kernel_sizes", [16, 16, 8, 4, 1], "none of them below its rate"),
    Refused("vocoder", "resblock_kernel_sizes", [3, 7, 10], "an odd whole number"),
    Refused("vocoder", "resblock_dilation_sizes", [[1, 3, 5]] * 2, "a list of 3"),
    Refused("vocoder", "upsample_initial_channel", 16, "a whole number of at least 32"),
    Refused("vocoder", "leaky_relu_slope", float("inf"), "a finite number"),
    Refused("vocoder", "normalize_before", None, "true or false"),
    # CLAP
    Refused("text_encoder", "audio_config.enable_fusion", True, "false: features of several crops"),
    Refused(
        "text_encoder", "audio_config.num_mel_bins", 128, "they must be equal", ("feature_extractor", "feature_size")
    ),
    Refused(
        "text_encoder",
        "audio_config.spec_size",
        100,
        "a divisor of spec_size, 100",
        ("text_encoder", "audio_config.num_mel_bins"),
    ),
    Refused(
        "text_encoder",
        "audio_config.spec_size",
        128,
        r"at most 2\.55, since the audio tower takes",
        ("feature_extractor", "max_length_s"),
    ),
    Refused("text_encoder", "audio_config.patch_embed_input_channels", 3, "1"),
    Refused("text_encoder", "audio_config.flatten_patch_embeds", False, "true"),
    Refused("text_encoder", "audio_config.depths", 4, "a list"),
    Refused("text_encoder", "audio_config", [], "a JSON object"),
    Refused(
        "text_encoder", "text_config.max_position_embeddings", 256, "a whole number of at least 514, for prompts of"
    ),
    Refused("text_encoder", "text_config.max_position_embeddings", 513, "a whole number of at least 514"),
    Refused("text_encoder", "text_config.hidden_act", "tanhshrink", "gelu"),
    Refused("text_encoder", "text_config.pad_token_id", None, WHOLE),
    Refused(
        "text_encoder",
        "text_config.num_attention_heads",
        5,
        "a multiple of 5",
        ("text_encoder", "text_config.hidden_size"),
    ),
    Refused("text_encoder", "projection_dim", 32, "they must be equal", ("projection_model", "text_encoder_dim")),
    Refused("text_encoder", "projection_dim", True, WHOLE),
    Refused("feature_extractor", "truncation", "fusion", "rand_trunc"),
    Refused("feature_extractor", "truncation", None, "rand_trunc"),
    Refused("feature_extractor", "padding", True, "pad, repeat or repeatpad"),
    Refused("feature_extractor", "padding", "reflect", "pad, repeat or repeatpad"),
    Refused("feature_extractor", "max_length_s", 20, "at most 10.2"),
    Refused("feature_extractor", "max_length_s", 10.0, WHOLE),
    Refused("feature_extractor", "hop_length", 160, r"at most 3\.41", ("feature_extractor", "max_length_s")),
    Refused("feature_extractor", "hop_length", 0, WHOLE),
    Refused("feature_extractor", "fft_window_size", -1, WHOLE),
    Refused("feature_extractor", "feature_size", 128, "they must be equal"),
    Refused("feature_extractor", "sampling_rate", "48000", WHOLE),
    Refused("feature_extractor", "frequency_min", -50, "a number of at least 0"),
    # T5
    Refused("text_encoder_2", "feed_forward_proj", "gated-tanh-gelu", "gated-gelu"),
    Refused("text_encoder_2", "feed_forward_proj", None, "gated-gelu"),
    Refused("text_encoder_2", "feed_forward_proj", "GATED-GELU", "gated-gelu"),
    Refused("text_encoder_2", "is_decoder", True, "false"),
    Refused("text_encoder_2", "d_model", 64, "they must be equal", ("projection_model", "text_encoder_1_dim")),
    Refused("text_encoder_2", "d_kv", 0, WHOLE),
    Refused("text_encoder_2", "num_layers", "2", WHOLE),
    Refused("text_encoder_2", "num_heads", [4], WHOLE),
    Refused("text_encoder_2", "relative_attention_num_buckets", 2, "a whole number of at least 4"),
    Refused("text_encoder_2", "relative_attention_max_distance", 8, "a whole number of at least 9"),
    Refused("text_encoder_2", "layer_norm_epsilon", 0, "above 0"),
    Refused("text_encoder_2", "hidden_size", 64, "96, as d_model"),
    # Projection model
    Refused("projection_model", "use_learned_position_embedding", True, "null: it is for speech"),
    Refused("projection_model", "use_learned_position_embedding", False, "null: it is for speech"),
    Refused("projection_model", "text_encoder_dim", 32, "they must be equal"),
    Refused("projection_model", "text_encoder_1_dim", 32, "they must be equal"),
    Refused("projection_model", "langauge_model_dim", 32, "they must be equal"),
    Refused("projection_model", "text_encoder_dim", [64], WHOLE),
    # GPT-2
    Refused("language_model", "n_positions", 64, "a whole number of at least 524, for prompts of 512 tokens"),
    Refused("language_model", "n_positions", 523, "a whole number of at least 524"),
    Refused("language_model", "max_new_tokens", 1000, "of at least 1516", ("language_model", "n_positions")),
    Refused("language_model", "max_new_tokens", 0, WHOLE),
    Refused("language_model", "max_new_tokens", -8, WHOLE),
    Refused("language_model", "max_new_tokens", None, WHOLE),
    Refused("language_model", "max_new_tokens", True, WHOLE),
    Refused("language_model", "max_new_tokens", 8.0, WHOLE),
    Refused("language_model", "n_embd", 32, "they must be equal", ("projection_model", "langauge_model_dim")),
    Refused("language_model", "n_head", 5, "a multiple of 5", ("language_model", "n_embd")),
    Refused("language_model", "n_inner", 0, "null, or a whole number"),
    Refused("language_model", "activation_function", "laplace", "gelu_new"),
    Refused("language_model", "hidden_size", 128, "64, as n_embd"),
    # Tokenizers
    Refused("tokenizer", "model_max_length", 10**30, "a whole number from 3 to 512"),
    Refused("tokenizer", "model_max_length", 1024, "a whole number from 3 to 512"),
    Refused("tokenizer", "model_max_length", 2, "a whole number from 3 to 512"),
    Refused("tokenizer", "model_max_length", None, "a whole number from 3 to 512"),
    Refused("tokenizer", "padding_side", "left", "right"),
    Refused("tokenizer", "truncation_side", "middle", "left or right"),
    Refused("tokenizer", "pad_token", None, "a token"),
    Refused("tokenizer", "split_special_tokens", True, "false"),
    Refused("tokenizer", "model_input_names", ["input_ids"], "a list with attention_mask"),
    Refused("tokenizer_2", "model_max_length", 10**30, "a whole number from 3 to 512"),
    Refused("tokenizer_2", "model_max_length", 513, "a whole number from 3 to 512"),
    Refused("tokenizer_2", "model_max_length", "512", "a whole number from 3 to 512"),
    Refused("tokenizer_2", "padding_side", "both", "left or right"),
    Refused("tokenizer_2", "pad_token", 0, "a token"),
    Refused("tokenizer_2", "split_special_tokens", True, "false"),
    # Scheduler
    Refused("scheduler", "beta_schedule", "cosine", "linear, scaled_linear or squaredcos_cap_v2"),
    Refused("scheduler", "beta_schedule", "sigmoid", "linear, scaled_linear or squaredcos_cap_v2"),
    Refused("scheduler", "prediction_type", "flow_prediction", "epsilon, sample or v_prediction"),
    Refused("scheduler", "prediction_type", None, "epsilon, sample or v_prediction"),
    Refused("scheduler", "num_train_timesteps", 0, WHOLE),
    Refused("scheduler", "num_train_timesteps", 1000.0, WHOLE),
    Refused("scheduler", "num_train_timesteps", "1000", WHOLE),
    Refused("scheduler", "num_train_timesteps", 10**12, "from 1 to 1000000"),
    Refused("scheduler", "beta_start", float("nan"), "above 0"),
    Refused("scheduler", "beta_end", "0.02", "above 0"),
    Refused("scheduler", "trained_betas", [], "a list"),
    Refused("scheduler", "trained_betas", [0.1, float("nan")], "a list"),
    Refused("scheduler", "timestep_spacing", "karras", "leading, linspace or trailing"),
    Refused("scheduler", "steps_offset", -1, WHOLE),
    Refused("scheduler", "clip_sample", "false", "true or false"),
)


@pytest.fixture
def checkpoint(demo_checkpoint, tmp_path) -> Path:
    """A copy to change, in a folder whose name has a space and letters outside ASCII."""
    return copy_checkpoint(demo_checkpoint, tmp_path / "ein Prüfstand 検")


@pytest.fixture
def no_loading(monkeypatch) -> None:
    def load(*_: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_cannot_be_served_is_refused_by_file_key_and_value(checkpoint, case):
    edit_json(config_file(checkpoint, case.component), {case.key: case.value})
    started = time.monotonic()
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint.find(str(checkpoint))
    assert time.monotonic() - started < MAX_REFUSAL_S
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    component, key = case.named or (case.component, case.key)
    shown = "" if case.named else json.dumps(case.value)[:80]
    assert f"{key} in {config_file(checkpoint, component)} is {shown}" in sentence, sentence
    assert re.search(case.supported, sentence), sentence


@pytest.mark.parametrize("content", ["null", "3", '"text"', "[]", "{", ""])
@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "tokenizer/tokenizer_config.json"])
def test_a_file_that_is_no_json_object_is_refused(checkpoint, file, content):
    (checkpoint / file).write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{checkpoint / file} (can't be read: |holds no JSON object)"):
        Checkpoint.find(str(checkpoint))


def index(**entries: Any) -> Callable[[Path], None]:
    return lambda checkpoint: edit_json(checkpoint / "model_index.json", entries)


def config(component: str, **changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint: edit_json(config_file(checkpoint, component), changes)


def lacking(component: str, key: str) -> Callable[[Path], None]:
    return lambda checkpoint: edit_json(config_file(checkpoint, component), {}, remove=(key,))


def new(component: str, **changes: Any) -> Callable[[Path], None]:
    return lambda checkpoint: replace(checkpoint, component, changes)


def swapped_weights(checkpoint: Path) -> None:
    (checkpoint / "vae/diffusion_pytorch_model.safetensors").unlink()
    source = checkpoint / "unet/diffusion_pytorch_model.safetensors"
    source.rename(checkpoint / "vae/diffusion_pytorch_model.safetensors")
    new("unet")(checkpoint)


def padding_in_tokenizer_json(checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer/tokenizer.json"))
    tokenizer.enable_padding(direction="left", pad_id=1, pad_token="<pad>")  # noqa: S106
    tokenizer.save(str(checkpoint / "tokenizer/tokenizer.json"))


def folder_for_a_file(checkpoint: Path) -> None:
    (checkpoint / "vae/config.json").unlink()
    (checkpoint / "vae/config.json").mkdir()


def useless_sentencepiece(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_2/tokenizer.json").unlink()
    (checkpoint / "tokenizer_2/spiece.model").write_bytes(b"nothing")


ODD_FILES = {
    "speech": (
        index(text_encoder_2=["transformers", "VitsModel"], tokenizer_2=["transformers", "VitsTokenizer"]),
        "model_index.json names VitsModel for text_encoder_2: speech checkpoints aren't supported yet",
    ),
    "another language model": (index(language_model=["transformers", "LlamaModel"]), "supported are GPT2Model, GPT2LM"),
    "another tokenizer": (index(tokenizer=["transformers", "BertTokenizer"]), "supported are RobertaTokenizer, Rob"),
    "swapped tokenizers": (index(tokenizer=["transformers", "T5Tokenizer"]), "the class T5Tokenizer for tokenizer"),
    "a scheduler of flows": (index(scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]), "for scheduler: supp"),
    "a scheduler of few steps": (index(scheduler=["diffusers", "LCMScheduler"]), "the class LCMScheduler for schedul"),
    "a scheduler that is no name": (index(scheduler=["diffusers", 7]), "names the class 7 for scheduler"),
    "another vocoder": (index(vocoder=["transformers", "UnivNetModel"]), "UnivNetModel for vocoder: supported are Sp"),
    "no vae": (index(vae=None), r"model_index\.json has no entry for vae"),
    "an empty entry": (index(unet=[]), r"model_index\.json has no entry for unet"),
    "an entry of one word": (index(unet="AudioLDM2UNet2DConditionModel"), r"has no entry for unet"),
    "no number of vectors": (lacking("language_model", "max_new_tokens"), "config.json lacks max_new_tokens: it must"),
    "no length of a tokenizer": (lacking("tokenizer_2", "model_max_length"), "lacks model_max_length: it must be a wh"),
    "no default length": (lacking("unet", "sample_size"), "lacks sample_size, whose default is null: it must be a wh"),
    "a VAE of pictures": (lacking("vae", "out_channels"), "lacks out_channels, whose default is 3: it must be 1, a sp"),
    "a fused extractor": (lacking("feature_extractor", "truncation"), 'lacks truncation, whose default is "fusion"'),
    "another size of text": (lacking("text_encoder_2", "d_model"), "text_encoder_1_dim in .* is 96, but d_model in "),
    "another class's configuration": (
        lambda checkpoint: shutil.copy(checkpoint / "vae/config.json", checkpoint / "projection_model/config.json"),
        "projection_model/config.json lacks text_encoder_dim",
    ),
    "no options of a tokenizer": (
        lambda checkpoint: (checkpoint / "tokenizer/tokenizer_config.json").unlink(),
        "tokenizer/tokenizer_config.json lacks model_max_length",
    ),
    "a tokenizer of too many tokens": (
        new("text_encoder_2", vocab_size=50),
        r"vocab_size in .*text_encoder_2/config.json is 50: it must be a whole number of at least \d+, for the tok",
    ),
    "another padding": (
        config("text_encoder", **{"text_config.pad_token_id": 0}),
        r"text_config.pad_token_id in .* is 0: it must be 1, which is <pad> in .*/tokenizer",
    ),
    "padding on the left in tokenizer.json": (
        padding_in_tokenizer_json,
        r"padding_side in .*tokenizer/tokenizer.json is \"left\": it must be \"right\"",
    ),
    "no tokenizer in tokenizer.json": (
        lambda checkpoint: (checkpoint / "tokenizer/tokenizer.json").write_text("{}"),
        "/tokenizer can't be loaded as RobertaTokenizer: .+",
    ),
    "no sentencepiece in spiece.model": (useless_sentencepiece, "/tokenizer_2 can't be loaded as T5Tokenizer: .+"),
    "a folder for a file": (folder_for_a_file, "vae/config.json can't be read: .*Is a directory"),
    "weights of another model": (swapped_weights, r"vae/\S+safetensors lacks (\d+) of \1 tensors of .*vae/config"),
    "weights of another width": (
        config("vocoder", upsample_initial_channel=512),
        r"model.safetensors has \S+ of the shape .*, and by .*vocoder/config.json it would be .*: the two aren't of",
    ),
    "weights of more layers": (
        config("unet", attention_head_dim=[2, 2, 3, 4], time_embedding_dim=128),
        r"safetensors has \S+ of the shape .*, and by .*unet/config.json it would be",
    ),
    "an option that the class refuses": (
        config("vocoder", leaky_relu_slope=0),
        "config.json can't be loaded as SpeechT5HifiGan: .*'leaky_relu_slope'.*expected float, got int .value: 0",
    ),
    "a scheduler whose steps are not numbers": (
        lambda checkpoint: (
            index(scheduler=["diffusers", "UniPCMultistepScheduler"])(checkpoint),
            config("scheduler", solver_type="bh1")(checkpoint),
        ),
        "scheduler_config.json can't be loaded as UniPCMultistepScheduler: its steps lead to numbers that aren't",
    ),
    "an unknown option of a scheduler": (
        lambda checkpoint: (
            index(scheduler=["diffusers", "DPMSolverMultistepScheduler"])(checkpoint),
            config("scheduler", algorithm_type="magic")(checkpoint),
        ),
        "scheduler_config.json can't be loaded as DPMSolverMultistepScheduler: magic is not implemented",
    ),
}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("case", ODD_FILES)
def test_odd_files_are_refused_in_a_sentence(checkpoint, case):
    change, expected = ODD_FILES[case]
    change(checkpoint)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=expected) as refusal:
        Checkpoint.find(str(checkpoint))
    assert time.monotonic() - started < MAX_REFUSAL_S
    assert str(checkpoint) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_is_no_checkpoint(checkpoint):
    file = checkpoint / "unet/diffusion_pytorch_model.safetensors"
    with pytest.raises(CheckpointError, match=f"--checkpoint {file} is a file: a checkpoint is a folder with mod"):
        Checkpoint.find(str(file))


def known_keys(schema: Schema) -> dict[str, Any]:
    keys = {name: key.default for name, key in schema.keys.items()}
    return keys | dict.fromkeys((*schema.harmless, *schema.sections), OWN_DEFAULT)


def as_json(value: Any) -> Any:
    return REQUIRED if value is inspect.Parameter.empty else json.loads(json.dumps(value))


def keys_of_class(config_class: Any) -> dict[str, Any]:
    parameters = inspect.signature(config_class.__init__).parameters
    named = {
        name: each.default
        for name, each in parameters.items()
        if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    }
    return {name: as_json(default) for name, default in named.items() if name != "self"}


@pytest.mark.parametrize(
    ("schema", "config_class"),
    [
        (SCHEMAS["text_encoder"], transformers.ClapConfig),
        (SCHEMAS["text_encoder"].sections["text_config"], transformers.ClapTextConfig),
        (SCHEMAS["text_encoder"].sections["audio_config"], transformers.ClapAudioConfig),
        (SCHEMAS["text_encoder_2"], transformers.T5Config),
        (SCHEMAS["language_model"], transformers.GPT2Config),
        (SCHEMAS["vocoder"], transformers.SpeechT5HifiGanConfig),
        (SCHEMAS["feature_extractor"], transformers.ClapFeatureExtractor),
        (SCHEMAS["projection_model"], diffusers.AudioLDM2ProjectionModel),
        (SCHEMAS["unet"], diffusers.AudioLDM2UNet2DConditionModel),
        (SCHEMAS["vae"], diffusers.AutoencoderKL),
    ],
)
def test_the_tables_have_every_key_of_the_classes_with_its_default(schema, config_class):
    own = {"max_new_tokens"} if config_class is transformers.GPT2Config else set()
    known, keys = known_keys(schema), keys_of_class(config_class)
    assert known.keys() - own == keys.keys()
    defaults = {name: default for name, default in known.items() if default is not OWN_DEFAULT and name not in own}
    assert defaults == {name: keys[name] for name in defaults}
    assert schema.aliases == getattr(config_class, "attribute_map", {})


def test_the_schedulers_are_those_of_the_pipeline():
    assert [scheduler.name for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers] == list(SCHEDULERS)
    assert DEFAULT_CHOICE.class_name == DEFAULT_SCHEDULER


def test_the_components_with_weights_are_modules_of_their_libraries():
    libraries = {"diffusers": diffusers, "transformers": transformers}
    for component, names in COMPONENT_CLASSES.items():
        for name in names if component in MODELS else ():
            assert issubclass(getattr(libraries[MODELS[component]], name), torch.nn.Module)
