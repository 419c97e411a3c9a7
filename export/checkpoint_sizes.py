"""Whether the components of a checkpoint fit together."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from export.checkpoint_files import CheckpointError

EQUAL_SIZES = (
    ("projection_model", "text_encoder_dim", "text_encoder", "projection_dim"),
    ("projection_model", "text_encoder_1_dim", "text_encoder_2", "d_model"),
    ("projection_model", "langauge_model_dim", "language_model", "n_embd"),  # diffusers spells it so
    ("unet", "in_channels", "vae", "latent_channels"),
    ("unet", "out_channels", "vae", "latent_channels"),
)
"""Pairs of a component and a key in its configuration that have to be equal."""


def check_sizes(configs: Mapping[str, Any], path: Callable[[str], Path]) -> None:
    """Raise CheckpointError unless each component takes what the one before it gives.

    Args:
        configs: Each model's configuration, with defaults, by component.
        path: Tells where a component's configuration is from.
    """
    for component, key, other, other_key in EQUAL_SIZES:
        size, other_size = getattr(configs[component], key), getattr(configs[other], other_key)
        if size != other_size:
            raise CheckpointError(
                f"{key} in {path(component)} is {size}, but {other_key} in {path(other)} is {other_size}: they must be "
                f"equal."
            )
    _check_mel_bins(configs["vocoder"].model_in_dim, configs["vae"].block_out_channels, path("vocoder"))
    widths = configs["language_model"].n_embd, configs["text_encoder_2"].d_model
    _check_cross_attention(configs["unet"].cross_attention_dim, *widths, path("unet"))


def _check_mel_bins(mel_bins: int, vae_levels: list[int], path: Path) -> None:
    factor = 2 ** (len(vae_levels) - 1)
    if mel_bins % factor:
        raise CheckpointError(
            f"model_in_dim in {path} is {mel_bins}: it must be a multiple of {factor}, by which the VAE shrinks "
            f"spectrograms."
        )


def _check_cross_attention(levels: Any, gpt2_width: int, t5_width: int, path: Path) -> None:
    """The UNet gives GPT-2's vectors to the first two layers of a level, T5's states to further ones; null: neither."""
    for level in _listed(levels):
        widths = _listed(level)
        expected = [gpt2_width, gpt2_width, *[t5_width] * len(widths)][: len(widths)]
        if any(width not in (None, fit) for width, fit in zip(widths, expected, strict=True)):
            raise CheckpointError(
                f"cross_attention_dim in {path} has {widths}: with this language_model and text_encoder_2, each must "
                f"be null or as in {expected}."
            )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
