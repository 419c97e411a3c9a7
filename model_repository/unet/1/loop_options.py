"""The parameters of the model `unet`, from its `config.pbtxt`."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from unet_shapes import FixedShape, Preparation

DTYPES = {"as_exported": None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

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
        dtype: Of the UNet's weights and activations; None for what was exported.
        preparation: Compilation and CUDA graphs.
    """

    max_rows: int = 32
    max_queue_size: int = 32
    queue_timeout_s: float = 600.0
    frames_per_forward: int | None = None
    max_latent_frames: int = 16_384
    text_buckets: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    poll_interval_s: float = 0.05
    drain_timeout_s: float = 20.0
    dtype: torch.dtype | None = None
    preparation: Preparation = field(default_factory=Preparation)

    def max_frames_per_forward(self, device: torch.device) -> int:
        """Return the budget of a forward on `device`."""
        return self.frames_per_forward or DEFAULT_FRAMES_PER_FORWARD[device.type]

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str]) -> "LoopOptions":
        """Read the `parameters` of config.pbtxt.

        Raises:
            ValueError: One is missing, unknown or out of bounds; the text names it.
        """
        reader = _Reader(parameters)
        options = cls(
            max_rows=reader.count("max_rows"),
            max_queue_size=reader.count("max_queue_size"),
            queue_timeout_s=float(reader.count("queue_timeout_s")),
            frames_per_forward=reader.count_or_auto("max_frames_per_forward"),
            max_latent_frames=reader.count("max_latent_frames"),
            text_buckets=reader.rising_counts("text_buckets"),
            poll_interval_s=reader.count("poll_interval_ms") / 1000,
            drain_timeout_s=float(reader.count("drain_timeout_s")),
            dtype=DTYPES[reader.choice("dtype", tuple(DTYPES))],
            preparation=Preparation(
                compile_backend=reader.text("compile_backend"),
                use_cuda_graphs=reader.choice("cuda_graphs", ("on", "off")) == "on",
                fixed_shapes=reader.fixed_shapes("fixed_shapes"),
                cache_folder=_folder(reader.text("compile_cache")),
            ),
        )
        reader.refuse_others()
        return options


class _Reader:
    """Reads parameters by name, with an error that names what is wrong."""

    def __init__(self, parameters: Mapping[str, str]) -> None:
        self._parameters = parameters
        self._known: list[str] = []

    def text(self, name: str) -> str:
        self._known.append(name)
        if name not in self._parameters:
            raise ValueError(f"config.pbtxt: parameter {name} is missing.")
        return self._parameters[name].strip()

    def count(self, name: str) -> int:
        return self._count(name, self.text(name))

    def count_or_auto(self, name: str) -> int | None:
        text = self.text(name)
        return None if text == "auto" else self._count(name, text)

    def rising_counts(self, name: str) -> tuple[int, ...]:
        counts = tuple(self._count(name, part) for part in self.text(name).split(","))
        if list(counts) != sorted(set(counts)):
            raise ValueError(f"config.pbtxt: parameter {name} must be in rising order, got {self.text(name)!r}.")
        return counts

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        text = self.text(name)
        if text not in choices:
            raise ValueError(f"config.pbtxt: parameter {name} must be one of {', '.join(choices)}, got {text!r}.")
        return text

    def fixed_shapes(self, name: str) -> tuple[FixedShape, ...]:
        shapes = []
        for part in filter(None, (part.strip() for part in self.text(name).split(","))):
            sizes = [self._count(name, size) for size in part.split("x")]
            if len(sizes) != 3:
                raise ValueError(f"config.pbtxt: parameter {name} must be ROWSxFRAMESxTOKENS, got {part!r}.")
            shapes.append(FixedShape(*sizes))
        return tuple(sorted(set(shapes)))

    def refuse_others(self) -> None:
        if unknown := sorted(self._parameters.keys() - set(self._known)):
            raise ValueError(f"config.pbtxt: unknown parameter {unknown[0]}; known are {', '.join(self._known)}.")

    def _count(self, name: str, text: str) -> int:
        if not (text.strip().isascii() and text.strip().isdigit() and int(text) > 0):
            raise ValueError(f"config.pbtxt: parameter {name} must be a positive whole number, got {text!r}.")
        return int(text)


def _folder(text: str) -> Path | None:
    return Path(os.path.expandvars(text)).expanduser() if text else None
