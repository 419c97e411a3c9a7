"""What one request asks of the denoising loop, and which shapes are refused."""

from dataclasses import dataclass

from denoising_errors import InvalidRequestError
from denoising_options import MAX_SEED, DenoisingOptions, SchedulerOptions
from torch import Tensor
from unet_shapes import NUM_BINS, UNetSizes

MAX_STEPS = 10_000
"""For direct calls of the model; what a client may ask of the ensemble is the tokenizer's business."""


@dataclass(frozen=True)
class SchedulerRequest:
    """Which steps are wanted.

    Attributes:
        name: A class of diffusers.
        options: What differs from the checkpoint's scheduler configuration.
        num_inference_steps: At least 1.
        eta: DDIM's noise, 0 to 1.
        seed: Of the noise that a scheduler draws.
    """

    name: str
    options: SchedulerOptions
    num_inference_steps: int
    eta: float
    seed: int


@dataclass(frozen=True)
class DenoisingRequest:
    """What one request asks of the loop.

    Attributes:
        generated_prompt_embeds: float32 [rows, 8, GPT-2 width]. With guidance, `rows` is twice the number of prompts,
            negative prompts first; without, the number of prompts.
        prompt_embeds: float32 [rows, tokens, T5 width].
        attention_mask: int64 [rows, tokens], 0 for padding.
        latents_shape: Waveforms, channels, frames, bins. Each prompt makes equally many consecutive waveforms.
        guidance_scale: None for no guidance.
        guidance_start, guidance_end: Between which parts of all forwards there is guidance, 0 to 1.
        scheduler: The steps, and the seed of the noise.
    """

    generated_prompt_embeds: Tensor
    prompt_embeds: Tensor
    attention_mask: Tensor
    latents_shape: tuple[int, int, int, int]
    guidance_scale: float | None
    scheduler: SchedulerRequest
    guidance_start: float = 0.0
    guidance_end: float = 1.0

    @classmethod
    def from_options(
        cls, generated_prompt_embeds: Tensor, prompt_embeds: Tensor, attention_mask: Tensor, options_json: bytes
    ) -> "DenoisingRequest":
        """Read the JSON that the tokenizer makes of the public inputs (its GenerationRequest.denoising_options).

        Raises:
            InvalidRequestError: An option is missing, unknown, or not of its kind.
        """
        options = DenoisingOptions(options_json)
        waveforms, channels, frames, bins = options.sizes("latents_shape", 4)
        request = cls(
            generated_prompt_embeds,
            prompt_embeds,
            attention_mask,
            latents_shape=(waveforms, channels, frames, bins),
            guidance_scale=options.number_or_none("guidance_scale"),
            guidance_start=options.fraction("guidance_start"),
            guidance_end=options.fraction("guidance_end"),
            scheduler=SchedulerRequest(
                name=options.text("scheduler"),
                options=options.scheduler_options("scheduler_options"),
                num_inference_steps=options.integer("num_inference_steps", 1, MAX_STEPS),
                eta=options.number("eta"),
                seed=options.integer("seed", 0, MAX_SEED),
            ),
        )
        options.refuse_others()
        return request

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the unconditional half is computed."""
        return self.guidance_scale is not None

    def is_guided(self, forward: int, num_forwards: int) -> bool:
        """Say whether a forward has guidance; by diffusers' rule for `control_guidance_start` and `_end`."""
        is_inside = forward / num_forwards >= self.guidance_start and (forward + 1) / num_forwards <= self.guidance_end
        return self.do_classifier_free_guidance and is_inside

    @property
    def rows_per_waveform(self) -> int:
        """With guidance, the unconditional row and the one with the prompt."""
        return 2 if self.do_classifier_free_guidance else 1

    @property
    def num_waveforms(self) -> int:
        """How many latents are denoised."""
        return self.latents_shape[0]

    @property
    def num_rows(self) -> int:
        """Rows of the UNet's batch that a step takes."""
        return self.num_waveforms * self.rows_per_waveform

    @property
    def num_prompts(self) -> int:
        """How many prompts the rows are for."""
        return len(self.prompt_embeds) // self.rows_per_waveform

    def check(self, sizes: UNetSizes, max_latent_frames: int) -> None:
        """Look at every shape before memory is allocated.

        Args:
            sizes: The UNet's.
            max_latent_frames: Waveforms x frames of a request, at most.

        Raises:
            InvalidRequestError: A tensor doesn't fit the others, or the UNet.
        """
        self._check_embeds(sizes)
        waveforms, channels, frames, bins = self.latents_shape
        if min(self.latents_shape) < 1 or channels != sizes.num_channels:
            raise InvalidRequestError(
                f"latents_shape must be positive sizes with {sizes.num_channels} channels, "
                f"got {list(self.latents_shape)}."
            )
        if waveforms * frames * bins > max_latent_frames * NUM_BINS:
            raise InvalidRequestError(
                f"latents_shape is out of bounds: waveforms x frames must be at most {max_latent_frames} with "
                f"{NUM_BINS} bins each, got {list(self.latents_shape)}."
            )
        if self.num_prompts < 1 or len(self.prompt_embeds) % self.rows_per_waveform:
            raise InvalidRequestError(
                f"prompt_embeds must have a row for each prompt, and with guidance one more for each negative prompt, "
                f"got {len(self.prompt_embeds)} rows and guidance_scale {self.guidance_scale}."
            )
        if waveforms % self.num_prompts:
            raise InvalidRequestError(
                f"latents_shape must start with a multiple of the {self.num_prompts} prompts, got {waveforms}."
            )

    def _check_embeds(self, sizes: UNetSizes) -> None:
        for name, width in (
            ("generated_prompt_embeds", sizes.generated_width),
            ("prompt_embeds", sizes.prompt_width),
        ):
            shape = getattr(self, name).shape
            if shape[1] < 1 or shape[2] != width:
                raise InvalidRequestError(f"{name} must be [rows, at least 1, {width}], got {list(shape)}.")
        rows, tokens = self.prompt_embeds.shape[:2]
        if tokens > sizes.max_tokens:
            raise InvalidRequestError(
                f"prompt_embeds is out of bounds: it must have at most {sizes.max_tokens} tokens, got {tokens}."
            )
        if len(self.generated_prompt_embeds) != rows:
            raise InvalidRequestError(
                f"generated_prompt_embeds must have as many rows as prompt_embeds ({rows}), "
                f"got {len(self.generated_prompt_embeds)}."
            )
        if self.attention_mask.shape != (rows, tokens):
            raise InvalidRequestError(
                f"attention_mask must have the shape [{rows}, {tokens}] of prompt_embeds, "
                f"got {list(self.attention_mask.shape)}."
            )
