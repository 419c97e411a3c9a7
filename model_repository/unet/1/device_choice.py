"""The device that an instance of the model runs on."""

import torch


def device_of(kind: str, device_id: int) -> torch.device:
    """Return the device that Triton has chosen for an instance.

    Args:
        kind: `CPU` or `GPU`, of the instance.
        device_id: Of the GPU.

    Raises:
        RuntimeError: It is to run on a GPU that PyTorch can't use. A slow server that nobody asked for isn't started.
    """
    if kind != "GPU":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"unet: Triton has a GPU for it, and PyTorch {torch.__version__} can't use one: install PyTorch for CUDA, "
            "or set the instance_group of its config.pbtxt to KIND_CPU."
        )
    if device_id >= (count := torch.cuda.device_count()):
        raise RuntimeError(
            f"unet: instance_group asks for GPU {device_id}, and PyTorch sees {count}: 0 to {count - 1}."
        )
    return torch.device("cuda", device_id)


def use_device(device: torch.device) -> None:
    """Make a GPU the present one of the calling thread, to which streams and graphs go; nothing for a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
