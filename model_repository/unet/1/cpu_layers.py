"""Layers of the UNet that CPUs compute faster otherwise: linear ones through oneDNN, upsampling as one convolution."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional

MIN_VALUES = 65_536
"""Below that many input values, MKL is as fast; and up to 20,480 PyTorch gives a convolution to neither of the two."""

MIN_BINS = 4
"""On narrower latents most of a transposed convolution's kernel is outside: docs/denoising.md has the measurement."""


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


class TransposedUpsample2D(Upsample2D):  # type: ignore[misc]  # diffusers has no types
    """diffusers' `Upsample2D` with nearest neighbours and a 3 x 3 convolution, for 4 / 9 of the multiplications.

    Each output sees 2 x 2 different inputs, though the convolution after the enlargement multiplies 3 x 3. Together
    they are a transposed convolution of stride 2: each of its 4 x 4 weights is a sum of those that see the same input.
    """

    kernel: Tensor

    def forward(
        self, hidden_states: Tensor, output_size: Sequence[int] | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return `hidden_states` [rows, channels, height, width] twice as high and wide, or of `output_size`."""
        height, width = hidden_states.shape[2:]
        if width < MIN_BINS or (output_size is not None and tuple(output_size) != (2 * height, 2 * width)):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return functional.conv_transpose2d(hidden_states, self.kernel, self.conv.bias, stride=2, padding=1)


def use_transposed_upsampling(model: nn.Module) -> None:
    """Turn the upsampling of a diffusers model into TransposedUpsample2D, in place, where it is of that kind."""
    upsampling: list[Any] = [module for module in model.modules() if _is_nearest_and_3_x_3(module)]
    for module in upsampling:
        kernel = _transposed_kernel(module.conv.weight.float()).to(module.conv.weight)
        module.register_buffer("kernel", kernel.contiguous(memory_format=torch.channels_last), persistent=False)
        module.__class__ = TransposedUpsample2D


def _is_nearest_and_3_x_3(module: Any) -> bool:
    return (
        type(module) is Upsample2D
        and module.interpolate
        and module.norm is None
        and module.name == "conv"
        and isinstance(module.conv, nn.Conv2d)
        and (module.conv.kernel_size, module.conv.padding, module.conv.stride) == ((3, 3), (1, 1), (1, 1))
    )


def _transposed_kernel(weight: Tensor) -> Tensor:
    """Return [in, out, 4, 4] from [out, in, 3, 3]: sums over 2 x 2 weights, transposed."""
    sums = functional.avg_pool2d(functional.pad(weight, (1, 1, 1, 1)), 2, stride=1, divisor_override=1)
    return sums.flip(2, 3).transpose(0, 1)
