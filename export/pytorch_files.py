"""Writes what the Python models load: tokenizers, sizes, the UNet's weights and the scheduler's configuration."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from export.checkpoint import Checkpoint
from export.checkpoint_loading import usable_schedulers
from export.model_names import PRECISION_NAMES
from export.onnx_stage import relative_error

PRECISIONS: dict[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in PRECISION_NAMES.items()}
"""What the UNet's weights can be rounded to. The other stages stay in float32."""


def write_tokenizer_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the version folder of the model `tokenizer`: both tokenizers, the checkpoint's sizes, its schedulers."""
    folder.mkdir(parents=True)
    for component, file in (("tokenizer", "clap_tokenizer.json"), ("tokenizer_2", "t5_tokenizer.json")):
        _standalone(checkpoint.load(component)).save(str(folder / file))
    classes = usable_schedulers(checkpoint.load("scheduler"))
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
        inputs = _small_inputs(checkpoint)
        exact = _small_forward(unet, inputs)
        unet = unet.to(PRECISIONS[precision])
        error = relative_error(_small_forward(unet, inputs), exact)
    unet.save_pretrained(folder / "unet", safe_serialization=True)
    for weights in (folder / "unet").glob("*.safetensors"):
        weights.chmod(0o644)  # they come as 0600, and a server in a container is another user
    write_scheduler_config(checkpoint, folder / "scheduler")
    return error


def write_scheduler_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the scheduler's configuration as it is in the checkpoint, with the class that `model_index.json` names.

    A scheduler of diffusers would save its own defaults along with it. Another class that is made from the
    configuration would then take them for choices, where its own defaults are others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = checkpoint.values("scheduler") | {"_class_name": checkpoint.class_name("scheduler")}
    (folder / "scheduler_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _small_inputs(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return random inputs of the UNet, float32: two rows of 16 x 16 latents."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "sample": (checkpoint.config("unet")["in_channels"], 16, 16),
        "encoder_hidden_states": (8, checkpoint.config("language_model")["n_embd"]),
        "encoder_hidden_states_1": (7, checkpoint.config("text_encoder_2")["d_model"]),
    }
    return {name: torch.randn(2, *shape, generator=generator) for name, shape in shapes.items()}


@torch.inference_mode()
def _small_forward(unet: Any, inputs: dict[str, torch.Tensor]) -> np.ndarray:
    """Return the noise prediction, float32."""
    output = unet(timestep=500, return_dict=False, **{name: value.to(unet.dtype) for name, value in inputs.items()})
    return output[0].float().numpy()


def _standalone(tokenizer: Any) -> Tokenizer:
    """Return the tokenizer with the padding and truncation that transformers keeps outside of it."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.enable_truncation(tokenizer.model_max_length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
    )
    return backend


def _audio_geometry(checkpoint: Checkpoint) -> dict[str, int]:
    vocoder, vae, unet = (checkpoint.config(component) for component in ("vocoder", "vae", "unet"))
    return {
        "sampling_rate": vocoder["sampling_rate"],
        "hop_length": math.prod(vocoder["upsample_rates"]),
        "num_mel_bins": vocoder["model_in_dim"],
        "vae_scale_factor": 2 ** (len(vae["block_out_channels"]) - 1),
        "num_latent_channels": unet["in_channels"],
        "default_num_latent_frames": unet["sample_size"],
    }
