"""What is the same for several rows is computed once.

The two rows of guidance have the same latents and the same timestep. They differ from the first layer on that sees the
text; diffusers computes the layers before it for both.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import AudioLDM2UNet2DConditionModel
from torch import Tensor, nn


class DistinctRows:
    """Lets the layers before the text compute equal neighbours among the rows once.

    Args:
        unet: Its first layers are changed, in place.
    """

    def __init__(self, unet: AudioLDM2UNet2DConditionModel) -> None:
        self._distinct: Tensor | None = None
        self._copies: Tensor | None = None
        for layer in _layers_before_text(unet):
            layer.forward = self._once(layer.forward)

    @contextmanager
    def shared(self, latents: Tensor, timesteps: Tensor) -> Iterator[None]:
        """Share what equal neighbours have in common, in the forward inside the block.

        Args:
            latents: [rows, channels, frames, bins], compared bit by bit.
            timesteps: [rows].
        """
        is_new = torch.ones(len(latents), dtype=torch.bool, device=latents.device)
        is_new[1:] = (latents[1:] != latents[:-1]).flatten(1).any(1) | (timesteps[1:] != timesteps[:-1])
        if not is_new.all():
            self._distinct, self._copies = is_new.nonzero()[:, 0], is_new.cumsum(0) - 1
        try:
            yield
        finally:
            self._distinct = self._copies = None

    def _once(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def on_distinct_rows(*inputs: Any, **named: Any) -> Any:
            if self._distinct is None:
                return forward(*inputs, **named)
            inputs = _rows_of(inputs, self._distinct)
            named = {name: _rows_of(value, self._distinct) for name, value in named.items()}
            return _rows_of(forward(*inputs, **named), self._copies)

        return on_distinct_rows


def _layers_before_text(unet: AudioLDM2UNet2DConditionModel) -> Iterator[nn.Module]:
    """Yield the levels without attention, and then what comes before the text on the first one that has it."""
    for block in unet.down_blocks:
        if not hasattr(block, "attentions"):
            yield block
            continue
        yield block.resnets[0]
        for attention, text_width in zip(block.attentions, block.cross_attention_dim, strict=False):
            if text_width is not None:
                return
            yield attention
        return


def _rows_of(value: Any, rows: Tensor | None) -> Any:
    """Return `rows` of a tensor, or of every tensor in a tuple; what else there may be stays."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows) for part in value)
    return value
