"""Copies of the demo checkpoint with one component made anew, of a few thousand parameters, in any configuration."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AudioLDM2ProjectionModel, AudioLDM2UNet2DConditionModel, AutoencoderKL
from transformers import (
    ClapConfig,
    ClapModel,
    GPT2Config,
    GPT2Model,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

from export.checkpoint_schemas import CONFIG_FILES
from export.demo import make_audible

CLAP_WIDTH, T5_WIDTH, GPT2_WIDTH = 64, 96, 64
"""Those of the demo checkpoint: what is made here fits its other components."""

CLAP_TEXT = {
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 514,
}
CLAP_AUDIO = {
    "patch_embeds_hidden_size": 8,
    "hidden_size": 64,
    "depths": [1, 1, 1, 1],
    "num_attention_heads": [1, 1, 2, 2],
}
T5 = {
    "vocab_size": 512,
    "d_model": T5_WIDTH,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 1,
    "num_heads": 2,
    "feed_forward_proj": "gated-gelu",
}
GPT2 = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "n_embd": GPT2_WIDTH, "n_layer": 1, "n_head": 2}
PROJECTION = {"text_encoder_dim": CLAP_WIDTH, "text_encoder_1_dim": T5_WIDTH, "langauge_model_dim": GPT2_WIDTH}
UNET = {
    "sample_size": 256,
    "in_channels": 8,
    "out_channels": 8,
    "block_out_channels": (8, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": ((None, GPT2_WIDTH, T5_WIDTH),) * 3,
}
VAE = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 8,
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.41,
}
VOCODER = {
    "model_in_dim": 64,
    "sampling_rate": 16_000,
    "upsample_rates": [5, 4],
    "upsample_kernel_sizes": [16, 8],
    "upsample_initial_channel": 16,
    "resblock_kernel_sizes": [3, 7],
    "resblock_dilation_sizes": [[1, 3], [1, 3]],
    "normalize_before": False,
}


def _link(source: str, target: str) -> None:
    """Copy small files; only link the large ones, which are replaced and never written into."""
    (os.link if source.endswith(".safetensors") else shutil.copy)(source, target)


def copy_checkpoint(source: Path, target: Path) -> Path:
    """Return a copy of the checkpoint that takes no time and no room."""
    return Path(shutil.copytree(source, target, copy_function=_link))


def config_file(checkpoint: Path, component: str) -> Path:
    """Return where the configuration of `component` is."""
    return checkpoint / component / CONFIG_FILES.get(component, "config.json")


def edit_json(path: Path, changes: Mapping[str, Any], remove: tuple[str, ...] = ()) -> None:
    """Change keys of a JSON object, `text_config.vocab_size` for one, and remove others."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *sections, name = key.split(".")
        place = content
        for section in sections:
            place = place[section]
        place[name] = value
    for key in remove:
        content.pop(key, None)
    path.write_text(json.dumps(content))


def replace(checkpoint: Path, component: str, changes: Mapping[str, Any]) -> None:
    """Make `component` anew with random weights and the keys of its configuration that `changes` has."""
    torch.manual_seed(0)
    model = _MAKERS[component](dict(changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What starts as zeros or ones would hide a wrong formula.
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
            assert parameter.isfinite().all(), name
    shutil.rmtree(checkpoint / component)
    model.save_pretrained(checkpoint / component)


def _clap(changes: dict[str, Any]) -> ClapModel:
    text, audio = CLAP_TEXT | changes.pop("text_config", {}), CLAP_AUDIO | changes.pop("audio_config", {})
    return ClapModel(ClapConfig(text_config=text, audio_config=audio, **{"projection_dim": CLAP_WIDTH} | changes))


def _gpt2(changes: dict[str, Any]) -> GPT2Model:
    num_embeds = changes.pop("max_new_tokens", 8)
    model = GPT2Model(GPT2Config(**GPT2 | changes))
    model.config.max_new_tokens = num_embeds
    return model


def _vocoder(changes: dict[str, Any]) -> SpeechT5HifiGan:
    vocoder = SpeechT5HifiGan(SpeechT5HifiGanConfig(**VOCODER | changes))
    vocoder.mean.normal_()
    vocoder.scale.uniform_(0.5, 2)
    make_audible(vocoder)
    return vocoder


_MAKERS = {
    "text_encoder": _clap,
    "text_encoder_2": lambda changes: T5EncoderModel(T5Config(**T5 | changes)),
    "projection_model": lambda changes: AudioLDM2ProjectionModel(**PROJECTION | changes),
    "language_model": _gpt2,
    "unet": lambda changes: AudioLDM2UNet2DConditionModel(**UNET | changes),
    "vae": lambda changes: AutoencoderKL(**VAE | changes),
    "vocoder": _vocoder,
}
