"""The sizes that a checkpoint's UNet expects, and the shapes that are prepared for it."""

from dataclasses import dataclass
from pathlib import Path

NUM_BINS = 16
"""Frequency bins of the latents, as all checkpoints have them."""

NUM_VECTORS = 8
"""Vectors that GPT-2 gives for a prompt, as all checkpoints have them: for shapes that are prepared beforehand."""


@dataclass(frozen=True)
class UNetSizes:
    """What a checkpoint's UNet expects.

    Attributes:
        num_channels: Of the latents.
        generated_width: Of GPT-2's vectors.
        prompt_width: Of T5's states.
        max_tokens: T5 states in a row, at most.
    """

    num_channels: int
    generated_width: int
    prompt_width: int
    max_tokens: int


@dataclass(frozen=True, order=True)
class FixedShape:
    """A shape for which the forward is prepared beforehand: compiled, or captured as a CUDA graph."""

    rows: int
    frames: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.frames}x{self.tokens}"


AUTO = "auto"
"""What the device decides (device_defaults.py)."""


@dataclass(frozen=True)
class Preparation:
    """How the forward is made fast.

    Attributes:
        compile_backend: Of `torch.compile`, such as `inductor`; empty for eager; or AUTO.
        cuda_graphs: `on`, `off` or AUTO. Without a GPU there are none.
        fixed_shapes: What is prepared; other shapes run eagerly. None for AUTO.
        cache_folder: Where compiled artefacts are kept; it is made private to its owner, since those who can write
            there can run code here.
    """

    compile_backend: str = ""
    cuda_graphs: str = "off"
    fixed_shapes: tuple[FixedShape, ...] | None = ()
    cache_folder: Path | None = None
