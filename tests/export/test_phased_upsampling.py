"""Upsampling by phases: the same values as diffusers' own layer."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D

from export.phased_upsampling import PhasedUpsample2D

TOLERANCE = 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (5, 2), (6, 8), (7, 5)])
def test_it_gives_what_diffusers_gives(height, width, bias):
    torch.manual_seed(0)
    upsampling = Upsample2D(6, use_conv=True, out_channels=5, bias=bias).requires_grad_(False)
    inputs = torch.randn(2, 6, height, width)
    expected = upsampling(inputs)
    output = PhasedUpsample2D(upsampling)(inputs)
    assert output.shape == expected.shape == (2, 5, 2 * height, 2 * width)
    assert (output - expected).norm() <= TOLERANCE * expected.norm()
