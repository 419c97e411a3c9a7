"""Linear layers through oneDNN, where that is faster than PyTorch's own choice."""

import torch
from torch import Tensor, nn
from torch.nn import functional

MIN_VALUES = 65_536
"""Below that many input values, MKL is as fast; and up to 20,480 PyTorch gives a convolution to neither of the two."""


class OneDNNLinear(nn.Linear):
    """`nn.Linear`, computed as the 1 x 1 convolution that it is.

    On CPUs, PyTorch gives float32 matrix products to MKL and convolutions to oneDNN. MKL makes little use of AVX-512 on
    processors that aren't Intel's: docs/denoising.md has the measurement. No values are copied.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return `input @ weight.T + bias`; float32 [..., in_features] -> [..., out_features]."""
        if input.numel() <= MIN_VALUES:
            return super().forward(input)
        pixels = input.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)
        output = functional.conv2d(pixels, self.weight[:, :, None, None], self.bias)
        return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], self.out_features)


def use_onednn_linear(model: nn.Module) -> None:
    """Turn the linear layers of a float32 model on the CPU into OneDNNLinear, in place."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear
