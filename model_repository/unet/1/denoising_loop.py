"""The denoising loop of one request: seeded noise becomes latents, as in `diffusers.AudioLDM2Pipeline.__call__`."""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AudioLDM2UNet2DConditionModel, SchedulerMixin
from torch import Tensor


class InvalidShapeError(ValueError):
    """Tensors of a request don't fit together."""


class SchedulerStepsError(ValueError):
    """The scheduler can't do that many steps, with this checkpoint's configuration."""


class NonFiniteError(ArithmeticError):
    """The latents have become infinite or NaN."""


@dataclass(frozen=True)
class DenoisingRequest:
    """What one request asks of the loop.

    Attributes:
        generated_prompt_embeds: float32 [rows, 8, GPT-2 width]. With guidance, `rows` is twice the number of prompts,
            negative prompts first; without, the number of prompts.
        prompt_embeds: float32 [rows, tokens, T5 width].
        attention_mask: int64 [rows, tokens], 0 for padding.
        latents_shape: Waveforms, channels, frames, bins. Each prompt makes equally many consecutive waveforms.
        num_inference_steps: At least 1.
        guidance_scale: Up to 1, there is no guidance.
        seed: Of the starting noise, and of the scheduler's if it draws any.
        eta: DDIM's noise, 0 to 1.
    """

    generated_prompt_embeds: Tensor
    prompt_embeds: Tensor
    attention_mask: Tensor
    latents_shape: tuple[int, int, int, int]
    num_inference_steps: int
    guidance_scale: float
    seed: int
    eta: float = 0.0

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional half is computed."""
        return self.guidance_scale > 1.0

    @property
    def num_prompts(self) -> int:
        """How many prompts the rows are for."""
        return len(self.prompt_embeds) // (2 if self.do_classifier_free_guidance else 1)

    def check(self) -> None:
        """Raise InvalidShapeError unless the rows of all tensors fit together."""
        rows = {len(self.generated_prompt_embeds), len(self.prompt_embeds), len(self.attention_mask)}
        if len(rows) != 1:
            raise InvalidShapeError(f"embeds and mask must have equally many rows, got {sorted(rows)}.")
        if self.attention_mask.shape != self.prompt_embeds.shape[:2]:
            raise InvalidShapeError(
                f"attention_mask must have the shape {list(self.prompt_embeds.shape[:2])} of prompt_embeds, got "
                f"{list(self.attention_mask.shape)}."
            )
        if min(self.latents_shape) < 1:
            raise InvalidShapeError(f"latents_shape must hold positive sizes, got {list(self.latents_shape)}.")
        if self.num_prompts < 1 or self.latents_shape[0] % self.num_prompts:
            raise InvalidShapeError(
                f"latents_shape must start with a multiple of the {self.num_prompts} prompts, got "
                f"{self.latents_shape[0]}."
            )


@torch.inference_mode()
def denoise(unet: AudioLDM2UNet2DConditionModel, scheduler: SchedulerMixin, request: DenoisingRequest) -> Tensor:
    """Run the whole loop.

    Args:
        unet: In inference mode, on the device where it shall run.
        scheduler: A new one; its state is this request's.
        request: Already checked.

    Returns:
        The denoised latents, of the UNet's type and on its device, shaped as `request.latents_shape` says.

    Raises:
        SchedulerStepsError: The scheduler failed; some of diffusers' do with very few or very many steps.
        NonFiniteError: The result isn't finite.
    """
    device, dtype = unet.device, unet.dtype
    # 1. One row of conditioning per row of latents.
    num_waveforms_per_prompt = request.latents_shape[0] // request.num_prompts
    generated_prompt_embeds, prompt_embeds, attention_mask = (
        tensor.to(device).repeat_interleave(num_waveforms_per_prompt, dim=0)
        for tensor in (
            request.generated_prompt_embeds.to(dtype),
            request.prompt_embeds.to(dtype),
            request.attention_mask,
        )
    )
    # 2. Noise, drawn on the CPU so that a seed means the same on every device.
    with _blame(scheduler, request):
        scheduler.set_timesteps(request.num_inference_steps, device=device)
    generator = torch.Generator("cpu").manual_seed(request.seed)
    latents = torch.randn(request.latents_shape, generator=generator, dtype=dtype).to(device)
    latents = latents * scheduler.init_noise_sigma
    step_options = _step_options(scheduler, generator, request.eta)
    # 3. Step by step.
    for timestep in scheduler.timesteps:
        latent_model_input = torch.cat([latents] * 2) if request.do_classifier_free_guidance else latents
        latent_model_input = scheduler.scale_model_input(latent_model_input, timestep)
        noise_pred = unet(
            latent_model_input,
            timestep,
            encoder_hidden_states=generated_prompt_embeds,
            encoder_hidden_states_1=prompt_embeds,
            encoder_attention_mask_1=attention_mask,
            return_dict=False,
        )[0]
        if request.do_classifier_free_guidance:
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + request.guidance_scale * (noise_pred_text - noise_pred_uncond)
        with _blame(scheduler, request):
            latents = scheduler.step(noise_pred, timestep, latents, **step_options, return_dict=False)[0]
    if not torch.isfinite(latents).all():
        raise NonFiniteError(
            f"{type(scheduler).__name__} with {request.num_inference_steps} steps gave latents that are not finite."
        )
    return latents


@contextlib.contextmanager
def _blame(scheduler: SchedulerMixin, request: DenoisingRequest) -> Iterator[None]:
    """Turn whatever a scheduler stumbles over into a SchedulerStepsError."""
    try:
        yield
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, ValueError) as error:
        raise SchedulerStepsError(
            f"is out of bounds: {type(scheduler).__name__} can't do {request.num_inference_steps} with this checkpoint "
            f"({type(error).__name__}: {error})."
        ) from error


def _step_options(scheduler: SchedulerMixin, generator: torch.Generator, eta: float) -> dict[str, Any]:
    """Return those of the options that this scheduler's `step` takes."""
    known = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in known}
