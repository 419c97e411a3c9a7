"""One forward of the UNet over rows of several requests."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from denoising_request import NUM_BINS, UNetSizes
from diffusers import AudioLDM2UNet2DConditionModel
from distinct_rows import DistinctRows
from onednn_linear import use_onednn_linear
from safetensors import safe_open
from text_conditioning import MASK_OF_PADDING, Conditioning, TextProjection
from torch import Tensor
from transposed_upsampling import use_transposed_upsampling

NUM_VECTORS = 8
"""Of GPT-2's, as all checkpoints have them: for shapes that are prepared beforehand."""

Forward = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Latents [rows, channels, frames, bins], timesteps float32 [rows], conditioning -> noise predictions."""


@dataclass(frozen=True, order=True)
class FixedShape:
    """A shape for which the forward is prepared beforehand: compiled, or captured as a CUDA graph."""

    rows: int
    frames: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.frames}x{self.tokens}"


@dataclass(frozen=True)
class Preparation:
    """How the forward is made fast.

    Attributes:
        compile_backend: Of `torch.compile`, such as `inductor`; empty for eager.
        use_cuda_graphs: Whether each fixed shape is captured. Without a GPU, it does nothing.
        fixed_shapes: What is prepared; other shapes run eagerly.
        cache_folder: Where compiled artefacts are kept; it is made private to its owner, since whoever can write there
            can run code here.
    """

    compile_backend: str = ""
    use_cuda_graphs: bool = False
    fixed_shapes: tuple[FixedShape, ...] = ()
    cache_folder: Path | None = None


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

    def prepare(self, preparation: Preparation) -> Iterator[tuple[FixedShape, float]]:
        """Compile and capture every fixed shape; yield each with the seconds that it took."""
        if preparation.compile_backend and preparation.cache_folder:
            _use_compile_cache(preparation.cache_folder)
        function = self._eager
        if preparation.compile_backend:
            limit = max(torch._dynamo.config.recompile_limit, len(preparation.fixed_shapes))
            torch._dynamo.config.recompile_limit = limit  # beyond it, shapes would silently run eagerly
            function = torch.compile(self._eager, backend=preparation.compile_backend, dynamic=False)
        for shape in preparation.fixed_shapes:
            start = time.perf_counter()
            inputs = self._blank_inputs(shape)
            capture = preparation.use_cuda_graphs and self.device.type == "cuda"
            with torch.inference_mode():
                self._fixed[shape] = FixedShapeForward(function, *inputs, capture=capture)
            yield shape, time.perf_counter() - start

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
        on_device = {"device": self.device, "dtype": self.dtype}
        return (
            torch.zeros(shape.rows, self.sizes.num_channels, shape.frames, NUM_BINS, device=self.device),
            torch.zeros(shape.rows, device=self.device),
            Conditioning(
                torch.zeros(shape.rows, NUM_VECTORS, self._projection.generated.out_features, **on_device),
                torch.zeros(shape.rows, shape.tokens, self._projection.prompt.out_features, **on_device),
                torch.zeros(shape.rows, shape.tokens, **on_device),
            ),
        )


class FixedShapeForward:
    """A forward over inputs that stay where they are, as CUDA graphs need it; missing rows and tokens are blank.

    Args:
        function: The forward, eager or compiled.
        latents, timesteps, conditioning: Where the inputs stay.
        capture: Whether to record a CUDA graph, and to replay it from then on.
    """

    def __init__(
        self, function: Forward, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, *, capture: bool
    ) -> None:
        self._function = function
        self._latents, self._timesteps, self._conditioning = latents, timesteps, conditioning
        self._loaded: Conditioning | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        for _ in range(2):  # the first compiles, the second lets libraries choose their kernels
            self._output = self._run()
        if capture:
            self._capture()

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the noise of rows that fit."""
        rows = len(latents)
        self._latents[:rows].copy_(latents)
        self._timesteps[:rows].copy_(timesteps)
        self._load(conditioning)
        if self._graph is None:
            return self._run()[:rows]
        self._graph.replay()
        return self._output[:rows].clone()

    def _run(self) -> Tensor:
        return self._function(self._latents, self._timesteps, self._conditioning)

    def _load(self, conditioning: Conditioning) -> None:
        """Copy the text of all rows, unless it is the same as last time."""
        if conditioning is self._loaded:
            return
        rows, tokens = conditioning.attention_mask.shape
        self._conditioning.generated[:rows].copy_(conditioning.generated)
        self._conditioning.prompt[:rows, :tokens].copy_(conditioning.prompt)
        self._conditioning.prompt[:rows, tokens:] = 0
        self._conditioning.attention_mask[:rows, :tokens].copy_(conditioning.attention_mask)
        self._conditioning.attention_mask[:rows, tokens:] = MASK_OF_PADDING
        self._loaded = conditioning

    def _capture(self) -> None:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = self._run()


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the type that the weights in `folder` were saved in."""
    file = min(folder.glob("*.safetensors"), key=lambda path: len(path.name))  # not a variant, such as `.fp16.`
    with safe_open(file, framework="pt") as tensors:
        return next(tensors.get_tensor(name).dtype for name in tensors.keys())  # noqa: SIM118


def _use_compile_cache(folder: Path) -> None:
    """Let Inductor keep what it compiles in `folder`.

    Raises:
        PermissionError: Others may write there, and could so run code here.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise PermissionError(
            f"{folder} holds compiled code, and others can write there: make it yours (chown, chmod 700), or set the "
            "parameter compile_cache to another folder."
        )
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
