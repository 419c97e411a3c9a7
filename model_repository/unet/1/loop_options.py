"""The parameters of the model `unet`, from its `config.pbtxt`."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from unet_shapes import AUTO, FixedShape, Preparation

if TYPE_CHECKING:
    from config_parameters import ConfigParameters

DTYPES = ("auto", "as_exported", "fp32", "fp16", "bf16")

DEFAULT_FRAMES_PER_FORWARD = {"cpu": 4096, "cuda": 16_384}
"""16 rows of 10.24 s on a CPU, where more rows take as much longer; 64 on a GPU."""


@dataclass(frozen=True)
class LoopOptions:
    """How the loop runs.

    Attributes:
        max_rows: Rows of all requests that are being denoised; further requests wait.
        max_queue_size: Requests that may wait; further ones are refused.
        queue_timeout_s: How long a request may wait.
        frames_per_forward: Rows x latent frames of a forward, at most; None for a default by device.
        max_latent_frames: Waveforms x latent frames of a request, at most.
        text_buckets: Token counts to which text is padded, in rising order.
        poll_interval_s: How often cancellation is looked for and metrics are published.
        drain_timeout_s: How long running requests may take when the server stops.
        dtype: Of the UNet's weights and activations; one of DTYPES.
        preparation: Compilation and CUDA graphs.
    """

    max_rows: int
    max_queue_size: int
    queue_timeout_s: float
    frames_per_forward: int | None
    max_latent_frames: int
    text_buckets: tuple[int, ...]
    poll_interval_s: float
    drain_timeout_s: float
    dtype: str
    preparation: Preparation

    def max_frames_per_forward(self, device: torch.device) -> int:
        """Return the budget of a forward on `device`."""
        return self.frames_per_forward or DEFAULT_FRAMES_PER_FORWARD[device.type]

    @classmethod
    def from_parameters(cls, parameters: "ConfigParameters") -> "LoopOptions":
        """Read the `parameters` of config.pbtxt.

        Raises:
            ValueError: One is missing, unknown or out of bounds; the text names it.
        """
        options = cls(
            max_rows=parameters.count("max_rows"),
            max_queue_size=parameters.count("max_queue_size"),
            queue_timeout_s=float(parameters.count("queue_timeout_s")),
            frames_per_forward=_count_or_auto(parameters, "max_frames_per_forward"),
            max_latent_frames=parameters.count("max_latent_frames"),
            text_buckets=_rising_counts(parameters, "text_buckets"),
            poll_interval_s=parameters.count("poll_interval_ms") / 1000,
            drain_timeout_s=float(parameters.count("drain_timeout_s")),
            dtype=parameters.choice("dtype", DTYPES),
            preparation=Preparation(
                compile_backend=parameters.text("compile_backend"),
                cuda_graphs=parameters.choice("cuda_graphs", (AUTO, "on", "off")),
                fixed_shapes=_fixed_shapes(parameters, "fixed_shapes"),
                cache_folder=_folder(parameters.text("compile_cache")),
            ),
        )
        parameters.refuse_others()
        return options


def _rising_counts(parameters: "ConfigParameters", name: str) -> tuple[int, ...]:
    text = parameters.text(name)
    counts = tuple(parameters.parse_count(name, part) for part in text.split(","))
    if list(counts) != sorted(set(counts)):
        raise ValueError(f"config.pbtxt: parameter {name} must be in rising order, got {text!r}.")
    return counts


def _fixed_shapes(parameters: "ConfigParameters", name: str) -> tuple[FixedShape, ...] | None:
    if parameters.text(name) == AUTO:
        return None
    shapes = []
    for part in filter(None, (part.strip() for part in parameters.text(name).split(","))):
        sizes = [parameters.parse_count(name, size) for size in part.split("x")]
        if len(sizes) != 3:
            raise ValueError(f"config.pbtxt: parameter {name} must be ROWSxFRAMESxTOKENS, got {part!r}.")
        shapes.append(FixedShape(*sizes))
    return tuple(sorted(set(shapes)))


def _count_or_auto(parameters: "ConfigParameters", name: str) -> int | None:
    text = parameters.text(name)
    return None if text == "auto" else parameters.parse_count(name, text)


def _folder(text: str) -> Path | None:
    return Path(os.path.expandvars(text)).expanduser() if text else None
