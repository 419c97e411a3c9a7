"""Linear layers as convolutions: the same values, whatever the shape, and no other layer is touched."""

import onednn_linear
import pytest
import torch
from onednn_linear import MIN_VALUES, OneDNNLinear, use_onednn_linear
from torch import nn

from tests.helpers.tiny_unet import relative_rms

TOLERANCE = 1e-6
FEATURES = 64
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

    original = onednn_linear.functional.conv2d
    monkeypatch.setattr(onednn_linear.functional, "conv2d", conv2d)
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
