"""The UNet at shapes that are prepared beforehand: inputs are filled up to them; and the compile cache."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from text_conditioning import MASK_OF_PADDING, Conditioning
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Latents [rows, channels, frames, bins], timesteps float32 [rows], conditioning -> noise predictions."""


class FixedShapeForward:
    """A forward over inputs that stay where they are, of one shape; missing rows and tokens are blank.

    Args:
        function: The forward, eager or compiled.
        latents, timesteps, conditioning: Where the inputs stay.
    """

    def __init__(self, function: Forward, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> None:
        self._function = function
        self._latents, self._timesteps, self._conditioning = latents, timesteps, conditioning
        for _ in range(2):  # the first compiles, the second lets libraries choose their kernels
            self._run()

    def __call__(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict the noise of rows that fit."""
        rows = len(latents)
        self._latents[:rows].copy_(latents)
        self._timesteps[:rows].copy_(timesteps)
        self._load(conditioning)
        return self._run()[:rows]

    def _run(self) -> Tensor:
        return self._function(self._latents, self._timesteps, self._conditioning)

    def _load(self, conditioning: Conditioning) -> None:
        """Copy the text of all rows."""
        rows, tokens = conditioning.attention_mask.shape
        self._conditioning.generated[:rows].copy_(conditioning.generated)
        self._conditioning.prompt[:rows, :tokens].copy_(conditioning.prompt)
        self._conditioning.prompt[:rows, tokens:] = 0
        self._conditioning.attention_mask[:rows, :tokens].copy_(conditioning.attention_mask)
        self._conditioning.attention_mask[:rows, tokens:] = MASK_OF_PADDING


def allow_compiled_shapes(count: int) -> None:
    """Let this thread use, and make, so many compiled variants of a function; beyond 8, it would be run eagerly."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, count)


def use_compile_cache(folder: Path) -> None:
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
