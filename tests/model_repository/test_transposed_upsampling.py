"""Upsampling by transposed convolutions: the same values, whatever the shape, and no other layer is touched."""

import pytest
import torch
import transposed_upsampling
from diffusers.models.upsampling import Upsample2D
from torch import nn
from transposed_upsampling import MIN_BINS, TransposedUpsample2D, use_transposed_upsampling

from tests.helpers.tiny_unet import relative_rms

TOLERANCE = 1e-6
CHANNELS, OUT = 6, 5


def make_upsampling(**options) -> Upsample2D:
    torch.manual_seed(0)
    return Upsample2D(CHANNELS, **{"use_conv": True, "out_channels": OUT} | options).requires_grad_(False)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def transposed(monkeypatch) -> list[torch.Size]:
    """The inputs of transposed convolutions."""
    shapes = []

    def conv_transpose2d(hidden_states, *arguments, **options):
        shapes.append(hidden_states.shape)
        return original(hidden_states, *arguments, **options)

    original = transposed_upsampling.functional.conv_transpose2d
    monkeypatch.setattr(transposed_upsampling.functional, "conv_transpose2d", conv_transpose2d)
    return shapes


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("height", "width", "output_size", "in_one"),
    [
        (1, MIN_BINS, None, True),
        (5, MIN_BINS, None, True),
        (5, MIN_BINS - 1, None, False),
        (5, MIN_BINS + 1, None, True),
        (7, 8, (14, 16), True),
        (7, 8, torch.Size((14, 16)), True),
        # Lengths that the levels don't divide: the border is elsewhere.
        (7, 8, (13, 16), False),
        (7, 8, (14, 15), False),
    ],
)
def test_it_gives_what_diffusers_gives(height, width, output_size, in_one, bias, channels_last, transposed):
    upsampling = make_upsampling(bias=bias)
    inputs = values(3, CHANNELS, height, width)
    expected = upsampling(inputs, output_size)
    use_transposed_upsampling(upsampling)
    if channels_last:
        upsampling.to(memory_format=torch.channels_last)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    output = upsampling(inputs, output_size)
    assert len(transposed) == in_one
    assert output.shape == expected.shape
    assert relative_rms(output, expected) <= TOLERANCE


def test_half_precision_is_rounded_once():
    upsampling = make_upsampling().bfloat16()
    weights = upsampling.conv.weight.float()
    use_transposed_upsampling(upsampling)
    expected = weights.sum((2, 3)).T
    # All nine weights are in the kernel, each 4 times; a sum of them is rounded to 8 bits.
    assert torch.allclose(upsampling.kernel.float().sum((2, 3)), 4 * expected, atol=0.02)
    assert upsampling.kernel.dtype == torch.bfloat16


class OtherUpsampling(Upsample2D):
    pass


@pytest.mark.parametrize(
    "other",
    [
        make_upsampling(use_conv=False, out_channels=CHANNELS),
        make_upsampling(use_conv_transpose=True),
        make_upsampling(norm_type="ln_norm"),
        make_upsampling(interpolate=False),
        make_upsampling(kernel_size=5, padding=2),
        make_upsampling(name="other"),
        OtherUpsampling(CHANNELS, use_conv=True),
        nn.Conv2d(CHANNELS, OUT, 3, padding=1),
    ],
    ids=["no convolution", "transposed", "norm", "not enlarged", "5 x 5", "another name", "subclass", "convolution"],
)
def test_other_layers_stay(other):
    before, names = type(other), set(other.state_dict())
    use_transposed_upsampling(other)
    assert type(other) is before
    assert set(other.state_dict()) == names


def test_what_is_saved_stays_the_same():
    upsampling = make_upsampling()
    names = set(upsampling.state_dict())
    use_transposed_upsampling(upsampling)
    assert type(upsampling) is TransposedUpsample2D
    assert set(upsampling.state_dict()) == names
