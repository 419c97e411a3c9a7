"""What `auto` means on a device: the type of the numbers, CUDA graphs, compilation, and for which shapes.

On a CPU: as exported, and nothing is prepared. On a GPU: half precision if the checkpoint bears it, CUDA graphs, and
Inductor where it can work, for the checkpoint's own length of audio.
"""

import importlib.util
import shutil
from dataclasses import dataclass

import torch
from loop_options import LoopOptions
from unet_shapes import AUTO, FixedShape

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

GRAPH_ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32)
"""Rows for which there are graphs. A forward with fewer is filled up, at most by a half."""

GRAPH_TOKENS = 64
"""T5 states of a row in the graphs: prompts of some 45 words. More tokens take little more time."""


@dataclass(frozen=True)
class Choice:
    """How the UNet runs.

    Attributes:
        dtypes: What its numbers may be, the first that it bears; None for what was exported.
        compile_backend: Of `torch.compile`; empty for none.
        uses_graphs: Whether whole ticks are captured.
        shapes: What is prepared.
    """

    dtypes: tuple[torch.dtype | None, ...]
    compile_backend: str
    uses_graphs: bool
    shapes: tuple[FixedShape, ...]

    def describe(self, dtype: torch.dtype) -> dict[str, str]:
        """Return what was chosen, by the names of the parameters."""
        return {
            "dtype": str(dtype).removeprefix("torch."),
            "compile_backend": self.compile_backend or "none",
            "cuda_graphs": "on" if self.uses_graphs else "off",
            "fixed_shapes": ",".join(map(str, self.shapes)) or "none",
        }


def choose(options: LoopOptions, device: torch.device, default_frames: int) -> Choice:
    """Decide what the options leave to the device.

    Args:
        options: Of `config.pbtxt`.
        device: Where the UNet runs.
        default_frames: Latent frames of the checkpoint's own length of audio.
    """
    on_gpu, prepared = device.type == "cuda", options.preparation
    backend, shapes = prepared.compile_backend, prepared.fixed_shapes
    if backend == AUTO:
        backend = "inductor" if on_gpu and can_compile() else ""
    if shapes is None:
        shapes = _shapes(options, device, default_frames) if on_gpu else ()
    return Choice(
        dtypes=_dtypes(options.dtype, on_gpu=on_gpu),
        compile_backend=backend,
        uses_graphs=on_gpu and prepared.cuda_graphs != "off",
        shapes=shapes,
    )


def can_compile() -> bool:
    """Say whether Inductor has what it needs for a GPU: its compiler of kernels, and one for C++."""
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("c++", "g++", "clang++")))


def _dtypes(name: str, *, on_gpu: bool) -> tuple[torch.dtype | None, ...]:
    if name == AUTO and on_gpu:
        return (torch.float16, torch.bfloat16)
    return (DTYPES.get(name),)


def _shapes(options: LoopOptions, device: torch.device, frames: int) -> tuple[FixedShape, ...]:
    most_rows = min(options.max_rows, max(1, options.max_frames_per_forward(device) // frames))
    tokens = min(
        (bucket for bucket in options.text_buckets if bucket >= GRAPH_TOKENS), default=options.text_buckets[-1]
    )
    return tuple(FixedShape(rows, frames, tokens) for rows in GRAPH_ROWS if rows <= most_rows)
