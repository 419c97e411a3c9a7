"""The UNet and the noise scheduler of the demo checkpoints. Needs torch and diffusers alone: benchmarks use it too."""

from typing import Any

from diffusers import AudioLDM2UNet2DConditionModel, DDIMScheduler

UNET_WIDTHS: dict[str, dict[str, Any]] = {
    "demo": {"block_out_channels": (64, 64, 96, 128), "attention_head_dim": (2, 2, 3, 4), "layers_per_block": 1},
    "full": {"block_out_channels": (128, 256, 384, 640), "attention_head_dim": (4, 8, 12, 20), "layers_per_block": 2},
}

TEXT_WIDTHS = {"demo": (64, 96), "full": (768, 1024)}
"""Of GPT-2's vectors and of T5's states."""

LATENT_FRAMES_PER_S = 25
"""16 kHz, 160 samples in a mel frame, 4 mel frames in a latent one."""


def make_unet(generated_width: int, prompt_width: int, **changes: Any) -> AudioLDM2UNet2DConditionModel:
    """Return a UNet with random weights and the official one's blocks.

    Args:
        generated_width: Of GPT-2's vectors.
        prompt_width: Of T5's states.
        changes: Widths, and what else differs from the official configuration.
    """
    config: dict[str, Any] = {
        "in_channels": 8,
        "out_channels": 8,
        "sample_size": 256,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        # On each resolution level: no text, only self-attention; GPT-2's vectors; T5's states.
        "cross_attention_dim": ((None, generated_width, prompt_width),) * 4,
    }
    return AudioLDM2UNet2DConditionModel(**config | changes)


def make_scheduler() -> DDIMScheduler:
    """Return the scheduler with the official configuration."""
    return DDIMScheduler(
        beta_start=0.0015,
        beta_end=0.0195,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def scheduler_config() -> dict[str, Any]:
    """Return what `scheduler_config.json` holds."""
    return {**make_scheduler().config, "_class_name": "DDIMScheduler"}
