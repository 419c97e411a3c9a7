"""For what a repository is exported: for CPUs, or for a GPU."""

TARGETS = ("cpu", "gpu")

AUTO = "auto"
"""Whichever this machine has."""


def choose_target(wanted: str) -> str:
    """Return one of TARGETS; AUTO is the GPU where PyTorch finds one, or where ONNX Runtime is installed with CUDA."""
    if wanted != AUTO:
        return wanted
    # Imported only here: they take seconds, and who names a target doesn't need them.
    import onnxruntime
    import torch

    has_gpu = torch.cuda.is_available() or "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return "gpu" if has_gpu else "cpu"
