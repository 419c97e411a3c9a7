"""Upsampling as four small convolutions, for 4 / 9 of the multiplications."""

from itertools import product

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional


class PhasedUpsample2D(nn.Module):
    """diffusers' `Upsample2D` with nearest neighbours and a 3 x 3 convolution, computed by phases.

    Each output sees 2 x 2 different inputs, though the convolution after the enlargement multiplies 3 x 3: weights that
    see the same input are added up beforehand. Which ones depends on whether the output's row and column are even or
    odd. A transposed convolution would do it in one, but ONNX Runtime keeps a matrix of four times the output for it.

    Args:
        upsampling: Its weights are taken.
    """

    def __init__(self, upsampling: Upsample2D) -> None:
        super().__init__()
        weight = upsampling.conv.weight
        self.bias = upsampling.conv.bias
        self.weights = nn.ParameterList(_fold(_fold(weight, 2, row), 3, column) for row, column in PHASES)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return float32 [rows, channels, 2 height, 2 width] from [rows, channels, height, width]."""
        outputs = []
        for (row, column), weight in zip(PHASES, self.weights, strict=True):
            padded = functional.pad(hidden_states, (1 - column, column, 1 - row, row))
            outputs.append(functional.conv2d(padded, weight, self.bias))
        return functional.pixel_shuffle(torch.stack(outputs, dim=2).flatten(1, 2), 2)


PHASES = tuple(product((0, 1), repeat=2))
"""Whether an output's row and column are odd, in the order of `pixel_shuffle`."""


def _fold(weight: Tensor, axis: int, phase: int) -> Tensor:
    """Return two weights along `axis` for three: even outputs see one input twice last, odd ones first."""
    one, two, three = torch.split(weight, 1, axis)
    return torch.cat([one + two, three] if phase else [one, two + three], axis)
