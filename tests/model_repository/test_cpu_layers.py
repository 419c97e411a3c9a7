"""Layers that CPUs compute otherwise: the same values, whatever the shape, and no other layer is touched."""

import cpu_layers
import pytest
import torch
from cpu_layers import (
    MIN_BINS,
    MIN_VALUES,
    OneDNNLinear,
    TransposedUpsample2D,
    use_onednn_linear,
    use_transposed_upsampling,
)
from diffusers.models.upsampling import Upsample2D
from torch import nn

from tests.helpers.tiny_unet import relative_rms

TOLERANCE = 1e-6
FEATURES = 64
CHANNELS, OUT = 6, 5
FEW, MANY = MIN_VALUES // FEATURES, MIN_VALUES // FEATURES + 1


def make_linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(FEATURES, 24, bias=bias).requires_grad_(False)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def convolutions(monkeypatch) -> list[torch.Size]:
    """The inputs of convolutions."""
    shapes = []

    def conv2d(pixels, *arguments):
        shapes.append(pixels.shape)
        return original(pixels, *arguments)

    original = cpu_layers.functional.conv2d
    monkeypatch.setattr(cpu_layers.functional, "conv2d", conv2d)
    return shapes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("inputs", "convolved"),
    [
        (values(FEW, FEATURES), False),
        (values(MANY, FEATURES), True),
        (values(2, FEW // 2, FEATURES), False),
        (values(3, MANY, FEATURES), True),
        (values(2, 3, MANY, FEATURES), True),
        (values(FEATURES), False),
        (values(0, FEATURES), False),
        # Not contiguous: transposed, every other position, some of the channels.
        (values(FEATURES, MANY).T, True),
        (values(MANY, 3, FEATURES).transpose(0, 1), True),
        (values(3, 2 * MANY, FEATURES)[:, ::2], True),
        (values(MANY, 2 * FEATURES)[:, FEATURES:], True),
        (values(FEATURES, FEW).T, False),
    ],
    ids=lambda value: "x".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else None,
)
def test_large_inputs_are_convolved_to_what_a_linear_layer_gives(inputs, convolved, bias, convolutions):
    linear = make_linear(bias)
    expected = linear(inputs)
    use_onednn_linear(linear)
    output = linear(inputs)
    assert len(convolutions) == convolved
    assert output.shape == expected.shape
    if inputs.numel():
        assert relative_rms(output, expected) <= TOLERANCE


def test_only_plain_linear_layers_are_changed():
    class OtherLinear(nn.Linear):
        """A subclass may compute something else."""

    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), OtherLinear(4, 4)), nn.Conv2d(4, 4, 1), nn.LayerNorm(4)
    )
    parameters = list(model.parameters())
    use_onednn_linear(model)
    assert [type(module) for module in model.modules()] == [
        nn.Sequential,
        OneDNNLinear,
        nn.Sequential,
        OneDNNLinear,
        OtherLinear,
        nn.Conv2d,
        nn.LayerNorm,
    ]
    assert all(now is before for now, before in zip(model.parameters(), parameters, strict=True))


def test_layers_stay_as_they_are_where_pytorch_has_no_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    linear = make_linear()
    use_onednn_linear(linear)
    assert type(linear) is nn.Linear


def make_upsampling(**options) -> Upsample2D:
    torch.manual_seed(0)
    return Upsample2D(CHANNELS, **{"use_conv": True, "out_channels": OUT} | options).requires_grad_(False)


@pytest.fixture
def transposed(monkeypatch) -> list[torch.Size]:
    """The inputs of transposed convolutions."""
    shapes = []

    def conv_transpose2d(hidden_states, *arguments, **options):
        shapes.append(hidden_states.shape)
        return original(hidden_states, *arguments, **options)

    original = cpu_layers.functional.conv_transpose2d
    monkeypatch.setattr(cpu_layers.functional, "conv_transpose2d", conv_transpose2d)
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
def test_transposed_upsampling_gives_what_diffusers_gives(
    height, width, output_size, in_one, bias, channels_last, transposed
):
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


def test_upsampling_in_half_precision_is_rounded_once():
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
def test_other_upsampling_stays_as_it_is(other):
    before, names = type(other), set(other.state_dict())
    use_transposed_upsampling(other)
    assert type(other) is before
    assert set(other.state_dict()) == names


def test_what_is_saved_of_upsampling_stays_the_same():
    upsampling = make_upsampling()
    names = set(upsampling.state_dict())
    use_transposed_upsampling(upsampling)
    assert type(upsampling) is TransposedUpsample2D
    assert set(upsampling.state_dict()) == names
