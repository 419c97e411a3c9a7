"""Writes what the Python models load: tokenizers, sizes, the UNet's weights and the scheduler's configuration."""

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint
from export.onnx_stage import relative_error

MAX_TEXT_TOKENS = 512
"""Where a tokenizer's own configuration sets no smaller length: CLAP's text tower has 512 positions."""

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What the UNet's weights can be rounded to. The other stages stay in float32."""


def write_tokenizer_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the version folder of the model `tokenizer`: both tokenizers, the checkpoint's sizes, its schedulers."""
    folder.mkdir(parents=True)
    for component, file in (("tokenizer", "clap_tokenizer.json"), ("tokenizer_2", "t5_tokenizer.json")):
        _standalone(checkpoint.load(component)).save(str(folder / file))
    classes = sorted(scheduler.__name__ for scheduler in _available_schedulers(checkpoint))
    (folder / "scheduler_classes.json").write_text(json.dumps(classes, indent=2) + "\n")
    (folder / "audio_geometry.json").write_text(json.dumps(_audio_geometry(checkpoint), indent=2) + "\n")


def write_postprocess_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the configuration of CLAP's feature extractor into the version folder of the model `postprocess`."""
    checkpoint.load("feature_extractor").save_pretrained(folder)


def write_unet_files(checkpoint: Checkpoint, folder: Path, precision: str = "fp32") -> float | None:
    """Write the UNet (safetensors) and the scheduler's configuration into the version folder of the model `unet`.

    Returns:
        The relative error of a forward with the rounded weights against float32; None where nothing was rounded.
    """
    unet = checkpoint.load("unet")
    error = None
    if precision != "fp32":
        exact = _small_forward(unet)
        unet = unet.to(PRECISIONS[precision])
        error = relative_error(_small_forward(unet), exact)
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.chmod(0o644)  # they come as 0600, and a server in a container is another user
    checkpoint.load("scheduler").save_pretrained(folder / "scheduler")
    return error


@torch.inference_mode()
def _small_forward(unet: Any) -> np.ndarray:
    """Return the noise prediction of two random rows of 0.64 s, float32."""
    generator = torch.Generator().manual_seed(0)
    cross_attentions = (module for module in unet.modules() if getattr(module, "is_cross_attention", False))
    generated_width, prompt_width = (next(cross_attentions).to_k.in_features for _ in range(2))
    inputs = [
        torch.randn(2, *shape, generator=generator).to(unet.dtype)
        for shape in ((unet.config.in_channels, 16, 16), (8, generated_width), (7, prompt_width))
    ]
    sample, generated, prompt = inputs
    output = unet(sample, 500, encoder_hidden_states=generated, encoder_hidden_states_1=prompt, return_dict=False)
    return output[0].float().numpy()


def _standalone(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer with the padding and truncation that transformers keeps outside of it."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.enable_truncation(min(tokenizer.model_max_length, MAX_TEXT_TOKENS))
    backend.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    return backend


def _available_schedulers(checkpoint: Checkpoint) -> list[type]:
    """Return what the checkpoint's scheduler can be replaced by; diffusers has dummies for what isn't installed."""
    return [
        scheduler
        for scheduler in checkpoint.load("scheduler").compatibles
        if not isinstance(scheduler, diffusers.utils.DummyObject)
    ]


def _audio_geometry(checkpoint: Checkpoint) -> dict[str, int]:
    vocoder, vae, unet = (checkpoint.load(component).config for component in ("vocoder", "vae", "unet"))
    return {
        "sampling_rate": vocoder.sampling_rate,
        "hop_length": math.prod(vocoder.upsample_rates),
        "num_mel_bins": vocoder.model_in_dim,
        "vae_scale_factor": 2 ** (len(vae.block_out_channels) - 1),
        "num_latent_channels": unet.in_channels,
        "default_num_latent_frames": unet.sample_size,
    }
