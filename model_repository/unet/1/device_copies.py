"""Copies to a device that make nobody wait."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on `device`; a GPU gets it in the order of its other work, out of pinned memory."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def start_copy_to_cpu(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU; of a GPU's tensor, its values are there once the GPU has done its work so far."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")
    return copy.copy_(tensor, non_blocking=True)
