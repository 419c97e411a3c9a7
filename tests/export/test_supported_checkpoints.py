"""Odd checkpoints that pass the export: each stage makes what diffusers makes of the same weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from audio_geometry import AudioGeometry
from candidate_ranking import CandidateRanking
from denoising_request import SchedulerRequest
from noise_schedulers import NoiseSchedulers
from scheduler_names import SchedulerNames
from scheduler_steps import DiffusersSteps, SchedulerSteps, Steps
from text_tokenizers import TextTokenizers
from unet_forward import UNetForward

from export.checkpoint import Checkpoint
from export.checkpoint_schemas import MODELS
from export.clap_audio import clap_audio_stage
from export.gpt2 import gpt2_stage
from export.onnx_stage import OnnxStage, export_stage, relative_error
from export.pytorch_files import (
    write_postprocess_files,
    write_scheduler_config,
    write_tokenizer_files,
    write_unet_files,
)
from export.text_encoder import text_encoder_stage
from export.vae import vae_stage
from export.vocoder import vocoder_stage
from tests.helpers.tiny_checkpoint import config_file, copy_checkpoint, edit_json, replace
from tests.helpers.tiny_unet import CPU, reference_noise

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4

Export = Callable[[Checkpoint], OnnxStage]


@pytest.fixture
def checkpoint(demo_checkpoint, tmp_path) -> Path:
    """A copy to change, in a folder whose name has a space and letters outside ASCII."""
    return copy_checkpoint(demo_checkpoint, tmp_path / "ein Prüfstand 検")


@dataclass(frozen=True)
class Supported:
    """A configuration that is supported: keys of one component, and what must change with them elsewhere."""

    component: str
    changes: Mapping[str, Any]
    elsewhere: Mapping[str, Mapping[str, Any]] | None = None

    def __str__(self) -> str:
        return f"{self.component}-{json.dumps(self.changes)[:60]}"

    def make(self, checkpoint: Path) -> Checkpoint:
        """Change `checkpoint` and find it."""
        replace(checkpoint, self.component, self.changes)
        for component, changes in (self.elsewhere or {}).items():
            if component in MODELS:
                replace(checkpoint, component, changes)
            else:
                edit_json(config_file(checkpoint, component), changes)
        return Checkpoint.find(str(checkpoint))


def level(*widths: int | None) -> tuple[tuple[int | None, ...], ...]:
    return (widths,) * 3


UNETS = [
    {},
    {"cross_attention_dim": level(64, 64, 96)},
    {"cross_attention_dim": level(64, None, 96, 96)},
    {"cross_attention_dim": level(64, None, 96)},
    {"cross_attention_dim": (level(None, 64)[0], level(64, None, 96)[0], level(None, 64, 96)[0])},
    {"cross_attention_dim": (64, level(None, 64)[0], level(None, 64, 96)[0])},
    {"down_block_types": ("CrossAttnDownBlock2D",) * 3, "up_block_types": ("CrossAttnUpBlock2D",) * 3},
    {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3},
    {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D",) * 3},
    {"only_cross_attention": True, "cross_attention_dim": level(64, 64, 96)},
    {"only_cross_attention": True},
    {"only_cross_attention": (False, True, False)},
    {"layers_per_block": (1, 2, 1)},
    {"layers_per_block": 3},
    {"transformer_layers_per_block": (1, 2, 3)},
    {"attention_head_dim": (1, 2, 4)},
    {"attention_head_dim": 3},
    {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": level(None, 64, 96)[:2],
    },
    {
        "block_out_channels": (8,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": level(None, 64, 96)[:1],
    },
    {"use_linear_projection": True},
    {"upcast_attention": True},
    {"resnet_time_scale_shift": "scale_shift"},
    {"time_embedding_dim": 20},
    {"time_embedding_act_fn": "silu", "timestep_post_act": "mish"},
    {"time_cond_proj_dim": 12},
    {"flip_sin_to_cos": False, "freq_shift": 1},
    {"conv_in_kernel": 1, "conv_out_kernel": 5},
    {"downsample_padding": 0},
    {"mid_block_scale_factor": 1.4},
    {"act_fn": "gelu", "norm_eps": 1e-3},
    {"act_fn": "mish"},
    {"norm_num_groups": 8},
    {"projection_class_embeddings_input_dim": 5},
    {"sample_size": 100},
]


@torch.inference_mode()
@pytest.mark.parametrize("changes", UNETS, ids=lambda changes: json.dumps(changes)[:70])
def test_a_unet_that_is_exported_predicts_what_diffusers_predicts(checkpoint, tmp_path, changes):
    found = Supported("unet", changes).make(checkpoint)
    write_unet_files(found, tmp_path / "unet")
    forward = UNetForward.load(tmp_path / "unet" / "unet", CPU, 512, None)
    unet = found.load("unet")
    generator = torch.Generator().manual_seed(0)
    generated, prompt = (torch.randn(2, *shape, generator=generator) for shape in ((8, 64), (5, 96)))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    timesteps = torch.tensor([500.0, 500.0])
    conditioning = forward.project(generated, prompt, mask)
    for frames in (8, 6):
        latents = torch.randn(1, 8, frames, 16, generator=generator).repeat(2, 1, 1, 1)
        noise = forward(latents, timesteps, conditioning)
        expected = reference_noise(unet, latents, timesteps, generated, prompt, mask)
        assert relative_error(noise.numpy(), expected.numpy()) < TOLERANCE, frames
        assert not torch.allclose(noise[0], noise[1]), "the text changes nothing"


STAGES: list[tuple[Export, Supported]] = [
    *(
        (vae_stage, Supported("vae", changes, elsewhere))
        for changes, elsewhere in [
            (
                {
                    "block_out_channels": (8,),
                    "down_block_types": ("DownEncoderBlock2D",),
                    "up_block_types": ("UpDecoderBlock2D",),
                    "use_quant_conv": False,
                    "use_post_quant_conv": False,
                },
                None,
            ),
            (
                {
                    "block_out_channels": (4, 8, 8, 12),
                    "down_block_types": ("DownEncoderBlock2D",) * 4,
                    "up_block_types": ("UpDecoderBlock2D",) * 4,
                    "mid_block_add_attention": False,
                    "act_fn": "mish",
                },
                None,
            ),
            ({"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D")}, None),
            (
                {
                    "latent_channels": 4,
                    "shift_factor": 0.5,
                    "latents_mean": [1.0] * 4,
                    "latents_std": [2.0] * 4,
                    "scaling_factor": 3,
                },
                {"unet": {"in_channels": 4, "out_channels": 4}},
            ),
            (
                {"norm_num_groups": 8, "force_upcast": False, "layers_per_block": 2, "in_channels": 2},
                {"vocoder": {"model_in_dim": 128}},
            ),
        ]
    ),
    *(
        (vocoder_stage, Supported("vocoder", changes))
        for changes in [
            {"normalize_before": True, "model_in_dim": 128},
            {"model_in_dim": 80, "sampling_rate": 48_000, "upsample_rates": [10, 6], "upsample_kernel_sizes": [20, 12]},
            {"sampling_rate": 22_050, "upsample_rates": [4, 4, 4], "upsample_kernel_sizes": [8, 8, 8]},
            {"upsample_rates": [3, 2], "upsample_kernel_sizes": [4, 5], "leaky_relu_slope": 0.3},
            {"upsample_rates": [4, 1], "upsample_kernel_sizes": [4, 1]},
            {"upsample_rates": [2], "upsample_kernel_sizes": [41], "upsample_initial_channel": 9},
            {"resblock_kernel_sizes": [1, 5, 13], "resblock_dilation_sizes": [[1], [2, 7], [1, 3, 5]]},
        ]
    ),
    *(
        (text_encoder_stage, Supported("text_encoder_2", t5, {"text_encoder": clap}))
        for t5, clap in [
            (
                {
                    "feed_forward_proj": "relu",
                    "relative_attention_num_buckets": 8,
                    "relative_attention_max_distance": 3,
                },
                {"text_config": {"max_position_embeddings": 600, "type_vocab_size": 2, "hidden_act": "relu"}},
            ),
            (
                {"feed_forward_proj": "gated-silu", "num_layers": 2, "d_kv": 7},
                {"projection_hidden_act": "gelu", "text_config": {"layer_norm_eps": 1e-3, "num_attention_heads": 1}},
            ),
        ]
    ),
    *(
        (clap_audio_stage, Supported("text_encoder", {"audio_config": changes}, {"feature_extractor": extractor}))
        for changes, extractor in [
            ({}, {"sampling_rate": 16_000, "frequency_max": 8_000}),
            (
                {"num_mel_bins": 128, "enable_patch_layer_norm": False, "qkv_bias": False, "mlp_ratio": 2.5},
                {"feature_size": 128, "max_length_s": 5},
            ),
        ]
    ),
]

# transformers tells that 128 mel bins are too many for its FFT; diffusers makes them all the same.
ignore_mel_filters = pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values:UserWarning")


@ignore_mel_filters
@pytest.mark.parametrize(
    ("export", "case"), STAGES, ids=lambda value: str(value) if isinstance(value, Supported) else ""
)
def test_a_stage_that_is_exported_computes_what_pytorch_computes(checkpoint, tmp_path, export, case):
    assert export_stage(export(case.make(checkpoint)), tmp_path / "stage") < TOLERANCE


def generated_by_diffusers(language_model: Any, embeds: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    with_head = transformers.GPT2LMHeadModel(language_model.config).eval()
    with_head.transformer = language_model
    pipeline = diffusers.AudioLDM2Pipeline.__new__(diffusers.AudioLDM2Pipeline)
    object.__setattr__(pipeline, "language_model", with_head)
    with torch.inference_mode():
        return pipeline.generate_language_model(embeds, attention_mask=mask, max_new_tokens=None).numpy()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_positions": 519, "n_head": 4, "n_inner": 40, "activation_function": "relu", "max_new_tokens": 3},
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False, "n_layer": 2},
        {"add_cross_attention": True, "reorder_and_upcast_attn": True, "max_new_tokens": 1},
    ],
    ids=json.dumps,
)
def test_a_language_model_that_is_exported_generates_what_diffusers_generates(checkpoint, tmp_path, changes):
    found = Supported("language_model", changes).make(checkpoint)
    assert export_stage(gpt2_stage(found), tmp_path / "stage") < TOLERANCE
    torch.manual_seed(0)
    # The longest prompt that there can be: 512 tokens and 5 vectors beside them.
    embeds, mask = torch.randn(2, 517, 64), torch.ones(2, 517, dtype=torch.int64)
    mask[1, 9:] = 0
    session = onnxruntime.InferenceSession(tmp_path / "stage" / "model.onnx")
    inputs = {"projected_prompt_embeds": embeds.numpy(), "projected_attention_mask": mask.numpy()}
    expected = generated_by_diffusers(found.load("language_model"), embeds, mask)
    assert relative_error(session.run(None, inputs)[0], expected) < TOLERANCE


TEXTS = ["a dog", "a church bell </s> ringing in the distance, and a <pad> dog <mask> barking in the rain", "Zürich"]
LEFT = {"padding_side": "left", "truncation_side": "left"}
TOKENIZERS = [
    ("tokenizer_2", {"padding_side": "left"}),
    ("tokenizer_2", {"truncation_side": "left", "model_max_length": 8}),
    ("tokenizer_2", {**LEFT, "model_max_length": 9}),
    ("tokenizer_2", {"model_max_length": 3}),
    ("tokenizer_2", {"pad_token": {"__type": "AddedToken", "content": "</s>"}}),
    ("tokenizer_2", {"extra_ids": 100, "extra_special_tokens": [f"<extra_id_{index}>" for index in range(100)]}),
    ("tokenizer_2", {"clean_up_tokenization_spaces": True, "legacy": True, "sp_model_kwargs": {}}),
    ("tokenizer", {"truncation_side": "left", "model_max_length": 8}),
    ("tokenizer", {"model_max_length": 3}),
    ("tokenizer", {"add_prefix_space": True, "trim_offsets": False}),
    ("tokenizer", {"errors": "strict", "model_max_length": 511, "tokenizer_class": "BertTokenizer"}),
]


@pytest.mark.parametrize(("component", "changes"), TOKENIZERS, ids=lambda value: json.dumps(value)[:60])
def test_a_tokenizer_that_is_exported_gives_the_tokens_that_diffusers_uses(checkpoint, tmp_path, component, changes):
    edit_json(config_file(checkpoint, component), changes)
    if "extra_ids" in changes:
        replace(checkpoint, "text_encoder_2", {"vocab_size": 700})
    found = Checkpoint.find(str(checkpoint))
    write_tokenizer_files(found, tmp_path / "tokenizer")
    negative = ["low quality, noisy, and more of it </s> than fits", "", "noise"]
    tokens = TextTokenizers(tmp_path / "tokenizer").tokenize(TEXTS, negative)
    t5, clap = found.load("tokenizer_2"), found.load("tokenizer")
    prompts = t5(TEXTS, padding=True, truncation=True, max_length=t5.model_max_length, return_tensors="np")
    length = prompts.input_ids.shape[1]
    negatives = t5(negative, padding="max_length", truncation=True, max_length=length, return_tensors="np")
    for ours, key in ((tokens.t5_input_ids, "input_ids"), (tokens.t5_attention_mask, "attention_mask")):
        np.testing.assert_array_equal(ours, np.concatenate([negatives[key], prompts[key]]))
    full = clap(
        [*negative, *TEXTS],
        padding="max_length",
        max_length=clap.model_max_length,
        truncation=True,
        return_tensors="np",
    )
    num_tokens = tokens.clap_input_ids.shape[1]
    np.testing.assert_array_equal(tokens.clap_input_ids, full.input_ids[:, :num_tokens])
    np.testing.assert_array_equal(tokens.clap_attention_mask, full.attention_mask[:, :num_tokens])
    assert full.attention_mask[:, num_tokens:].sum() == 0
    untruncated = [len(ids) for ids in t5(TEXTS).input_ids]
    kept = prompts.attention_mask.sum(1)
    np.testing.assert_array_equal(tokens.truncated_tokens, np.maximum(0, untruncated - kept))


DDIM = {"_class_name": "DDIMScheduler", "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
SCHEDULER_CONFIGS = [
    {"_class_name": "DDIMScheduler"},
    {**DDIM, "_diffusers_version": "0.2.0", "num_train_timesteps": 1000, "clip_sample": False},
    {**DDIM, "clip_sample": True},
    {**DDIM, "prediction_type": "v_prediction", "rescale_betas_zero_snr": False},
    {**DDIM, "timestep_spacing": "trailing", "steps_offset": 1, "set_alpha_to_one": False},
    {**DDIM, "num_train_timesteps": 500, "beta_schedule": "linear"},
    {**DDIM, "num_train_timesteps": 100, "trained_betas": np.linspace(1e-4, 2e-2, 100).tolist()},
    {**DDIM, "thresholding": True, "a_key_of_the_future": 7},
    {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_schedule": "squaredcos_cap_v2"},
    {**DDIM, "_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
    {**DDIM, "_class_name": "DPMSolverMultistepScheduler", "solver_order": 1, "lower_order_final": False},
    {**DDIM, "_class_name": "UniPCMultistepScheduler", "solver_order": 1, "use_karras_sigmas": True},
    {**DDIM, "_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True},
]
TRIED = {f"{name}Scheduler" for name in ("DDIM", "DPMSolverMultistep", "EulerDiscrete", "PNDM", "UniPCMultistep")}


def fake_unet(scaled: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.tanh(1.3 * scaled + 0.001 * float(timestep))


def latents_of_diffusers(scheduler: Any, num_steps: int) -> torch.Tensor:
    scheduler.set_timesteps(num_steps)
    latents = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(5)) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise = fake_unet(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(noise, timestep, latents).prev_sample
    return latents


def latents_of_ours(steps: Steps) -> torch.Tensor:
    latents = steps.noise((1, 2, 4, 16))
    state = torch.cat([latents.reshape(1, -1), torch.zeros(steps.memory - 1, latents.numel())])
    for forward, timestep in enumerate(steps.timesteps):
        noise = fake_unet(latents * steps.input_scale(forward), timestep)
        if isinstance(steps, DiffusersSteps):
            latents = steps.step(forward, noise, latents)
        else:
            state = torch.from_numpy(steps.table.coefficients[forward]) @ torch.cat([state, noise.reshape(1, -1)])
            latents = state[0].reshape(latents.shape)
    return latents


@pytest.mark.parametrize("config", SCHEDULER_CONFIGS, ids=lambda config: json.dumps(config)[:90])
def test_a_scheduler_that_is_exported_steps_as_in_diffusers(checkpoint, tmp_path, config):
    path = config_file(checkpoint, "scheduler")
    path.write_text(json.dumps(config))
    index = checkpoint / "model_index.json"
    edit_json(index, {"scheduler": ["diffusers", config["_class_name"]]})
    found = Checkpoint.find(str(checkpoint))
    write_scheduler_config(found, tmp_path / "scheduler")
    schedulers = SchedulerSteps(NoiseSchedulers.load(tmp_path / "scheduler" / "scheduler_config.json"))
    loaded = found.load("scheduler")
    write_tokenizer_files(found, tmp_path / "tokenizer")
    names = SchedulerNames.load(tmp_path / "tokenizer" / "scheduler_classes.json")
    for name in TRIED | {config["_class_name"]}:
        steps = schedulers.create(SchedulerRequest(names.choose(name).class_name, (), 7, 0.0, 5))
        # As a pipeline's user would: pipeline.scheduler = Other.from_config(pipeline.scheduler.config).
        expected = latents_of_diffusers(getattr(diffusers, name).from_config(loaded.config), 7)
        assert relative_error(latents_of_ours(steps).numpy(), expected.numpy()) < TOLERANCE, name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"max_length_s": 5},
        {"sampling_rate": 16_000, "frequency_max": 8_000, "nb_max_samples": 1},
        {"padding": "repeat", "fft_window_size": 800},
        {"padding": "pad", "frequency_min": 50, "top_db": 80},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("seconds", [0.7, 12.0])
def test_candidates_are_scored_by_the_features_that_diffusers_takes(checkpoint, tmp_path, changes, seconds):
    edit_json(config_file(checkpoint, "feature_extractor"), changes)
    found = Checkpoint.find(str(checkpoint))
    write_postprocess_files(found, tmp_path)
    rate = found.config("feature_extractor")["sampling_rate"]
    audio = np.random.RandomState(1).randn(2, int(seconds * rate)).astype(np.float32)
    extractor = found.load("feature_extractor")
    np.random.seed(3)
    expected = extractor(list(audio), sampling_rate=rate, return_tensors="np").input_features
    features = CandidateRanking(tmp_path).input_features(audio, rate, seed=3)
    assert relative_error(features, expected.astype(np.float32)) < TOLERANCE


@pytest.mark.parametrize("length", [None, 0.5, 3.217, 10.0])
@pytest.mark.parametrize(
    ("vocoder", "sample_size"),
    [
        ({"sampling_rate": 48_000, "upsample_rates": [10, 6], "upsample_kernel_sizes": [20, 12]}, 100),
        ({"sampling_rate": 22_050, "upsample_rates": [4, 4, 4], "upsample_kernel_sizes": [8, 8, 8]}, 256),
        ({"model_in_dim": 128, "sampling_rate": 44_100, "upsample_rates": [7], "upsample_kernel_sizes": [7]}, 1),
    ],
)
def test_lengths_are_those_of_diffusers(checkpoint, tmp_path, vocoder, sample_size, length):
    replace(checkpoint, "unet", {"sample_size": sample_size})
    found = Supported("vocoder", vocoder).make(checkpoint)
    write_tokenizer_files(found, tmp_path / "tokenizer")
    geometry = AudioGeometry.load(tmp_path / "tokenizer" / "audio_geometry.json")
    vae_scale_factor = 4
    factor = np.prod(vocoder["upsample_rates"]) / vocoder["sampling_rate"]
    seconds = sample_size * vae_scale_factor * factor if length is None else length
    assert geometry.default_audio_length_in_s == sample_size * vae_scale_factor * factor
    assert geometry.num_samples(seconds) == int(seconds * vocoder["sampling_rate"])
    frames = int(np.ceil(int(seconds / factor) / vae_scale_factor))
    bins = vocoder.get("model_in_dim", 64) // vae_scale_factor
    assert geometry.latents_shape(2, seconds) == (2, 8, frames, bins)
