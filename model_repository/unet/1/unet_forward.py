"""One forward of the UNet over rows of several requests."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from cpu_layers import use_onednn_linear, use_transposed_upsampling
from diffusers import AudioLDM2UNet2DConditionModel
from distinct_rows import DistinctRows
from fixed_shape_forward import FixedShapeForward, Forward, allow_compiled_shapes, use_compile_cache
from safetensors import safe_open
from text_conditioning import Conditioning, TextProjection
from torch import Tensor
from unet_shapes import NUM_BINS, NUM_VECTORS, FixedShape, Preparation, UNetSizes


class UNetForward:
    """The UNet of a checkpoint, ready to run.

    Args:
        unet: Its layers are changed; it belongs to this object from now on. What goes in and comes out is float32,
            whatever the type of its weights.
        device: Where it runs.
        max_tokens: T5 states in a row, at most.

    Attributes:
        sizes: What it expects of a request.
    """

    def __init__(self, unet: AudioLDM2UNet2DConditionModel, device: torch.device, max_tokens: int) -> None:
        self.device, self.dtype = device, unet.dtype
        unet.eval().requires_grad_(False)
        self._projection = TextProjection(unet).to(device)
        self._unet = unet.to(device, memory_format=torch.channels_last)
        self._distinct_rows: DistinctRows | None = None
        if device.type == "cpu":
            self._distinct_rows = DistinctRows(self._unet)
            use_transposed_upsampling(self._unet)
            if self.dtype == torch.float32:
                use_onednn_linear(self._unet)
        self.sizes = UNetSizes(
            num_channels=unet.config.in_channels,
            generated_width=self._projection.generated.in_features,
            prompt_width=self._projection.prompt.in_features,
            max_tokens=max_tokens,
        )
        self._fixed: dict[FixedShape, FixedShapeForward] = {}
        self._compiled: dict[FixedShape, Forward] = {}

    @classmethod
    def load(cls, folder: Path, device: torch.device, max_tokens: int, dtype: torch.dtype | None) -> "UNetForward":
        """Read the UNet's weights (safetensors) from `folder`; a `dtype` of None is the one that they were saved in."""
        unet = AudioLDM2UNet2DConditionModel.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            torch_dtype=dtype or _stored_dtype(folder),
        )
        return cls(unet, device, max_tokens)

    @torch.inference_mode()
    def project(self, generated_prompt_embeds: Tensor, prompt_embeds: Tensor, attention_mask: Tensor) -> Conditioning:
        """Project a request's text, once for all steps; the shapes are those of DenoisingRequest."""
        return self._projection(generated_prompt_embeds, prompt_embeds, attention_mask)

    @torch.inference_mode()
    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the noise.

        Args:
            latents: float32 [rows, channels, frames, bins], on the UNet's device, already scaled for the scheduler.
            timesteps: float32 [rows].
            conditioning: Of as many rows.

        Returns:
            float32 [rows, channels, frames, bins].
        """
        shape = self._fitting_shape(latents, conditioning)
        forward = self._fixed[shape] if shape else self._eager_on_distinct_rows
        return forward(latents, timesteps, conditioning).float()

    def forward_at(self, shape: FixedShape) -> Forward:
        """Return the fastest forward that there is for inputs of exactly this shape; it waits for no device."""
        function = self._compiled.get(shape, self._eager)
        return lambda latents, timesteps, conditioning: function(latents, timesteps, conditioning).float()

    def prepare(self, preparation: Preparation) -> Iterator[tuple[FixedShape, float]]:
        """Compile every fixed shape, or let it be filled up to; yield each with the seconds that it took."""
        function = self._eager
        if preparation.compile_backend:
            if preparation.cache_folder:
                use_compile_cache(preparation.cache_folder)
            allow_compiled_shapes(len({*self._fixed, *self._compiled, *(preparation.fixed_shapes or ())}))
            function = torch.compile(self._eager, backend=preparation.compile_backend, dynamic=False)
        for shape in preparation.fixed_shapes or ():
            start = time.perf_counter()
            with torch.inference_mode():
                forward = FixedShapeForward(function, *self._blank_inputs(shape))
            if preparation.cuda_graphs == "on":
                self._compiled[shape] = function  # for who captures it
            else:
                self._fixed[shape] = forward
            yield shape, time.perf_counter() - start

    def blank_text(self, vectors: int = NUM_VECTORS, rows: int = 1, tokens: int = 1) -> Conditioning:
        """Return text of zeros, as wide as what `project` returns."""
        on_device = {"device": self.device, "dtype": self.dtype}
        return Conditioning(
            torch.zeros(rows, vectors, self._projection.generated.out_features, **on_device),
            torch.zeros(rows, tokens, self._projection.prompt.out_features, **on_device),
            torch.zeros(rows, tokens, **on_device),
        )

    def _eager_on_distinct_rows(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        if self._distinct_rows is None:
            return self._eager(latents, timesteps, conditioning)
        with self._distinct_rows.shared(latents, timesteps):
            return self._eager(latents, timesteps, conditioning)

    def _eager(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return self._unet(
            latents.to(self.dtype, memory_format=torch.channels_last),
            timesteps,
            encoder_hidden_states=conditioning.generated,
            encoder_hidden_states_1=conditioning.prompt,
            encoder_attention_mask_1=conditioning.attention_mask,
            return_dict=False,
        )[0]

    def _fitting_shape(self, latents: Tensor, conditioning: Conditioning) -> FixedShape | None:
        """Return the smallest fixed shape that has room for the rows, if any; only rows and tokens can be filled up."""
        rows, _, frames, bins = latents.shape
        if (bins, conditioning.generated.shape[1]) != (NUM_BINS, NUM_VECTORS):
            return None
        tokens = conditioning.tokens
        return min(
            (s for s in self._fixed if s.frames == frames and s.rows >= rows and s.tokens >= tokens), default=None
        )

    def _blank_inputs(self, shape: FixedShape) -> tuple[Tensor, Tensor, Conditioning]:
        return (
            torch.zeros(shape.rows, self.sizes.num_channels, shape.frames, NUM_BINS, device=self.device),
            torch.zeros(shape.rows, 2, device=self.device).unbind(1)[0],  # in memory as DenoisingSlots has them
            self.blank_text(rows=shape.rows, tokens=shape.tokens),
        )


def default_frames(folder: Path) -> int:
    """Return the latent frames of the checkpoint's own length of audio, from the configuration in its `folder`."""
    return int(AudioLDM2UNet2DConditionModel.load_config(folder)["sample_size"])


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the type that the weights in `folder` were saved in."""
    file = min(folder.glob("*.safetensors"), key=lambda path: len(path.name))  # not a variant, such as `.fp16.`
    with safe_open(file, framework="pt") as tensors:
        return next(tensors.get_tensor(name).dtype for name in tensors.keys())  # noqa: SIM118
