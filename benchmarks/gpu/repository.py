"""A whole checkpoint, and the model repository that is made of it; behind the sections about the UNet."""

import importlib.util
from pathlib import Path

from benchmarks.gpu.case import Case
from benchmarks.gpu.results import NotPossibleError, Results
from benchmarks.gpu.runner import wait_for
from export.checkpoint import Checkpoint
from export.demo import write_checkpoint
from export.repository import export_checkpoint

STAGES = ("text_encoder", "gpt2", "vae", "vocoder")
CUDA = "CUDAExecutionProvider"


def checkpoint(case: Case, results: Results) -> None:  # noqa: ARG001 - it goes on behind others
    """A whole checkpoint of random weights, which diffusers' pipeline can load too."""
    write_checkpoint(checkpoint_folder(case), size=case.size, language_model="GPT2LMHeadModel")


def checkpoint_folder(case: Case) -> Path:
    """Return where the checkpoint is."""
    return case.work / "checkpoint"


def repository_folder(case: Case) -> Path:
    """Return where its export is."""
    return case.work / "repository"


def export(case: Case, results: Results) -> None:
    """The model repository that is made of it."""
    if not (case.is_rehearsal or has_cuda() or importlib.util.find_spec("pytriton")):
        raise NotPossibleError("neither onnxruntime-gpu nor nvidia-pytriton is installed")
    wait_for(case, results, "checkpoint")
    export_checkpoint(
        Checkpoint.find(str(checkpoint_folder(case))),
        repository_folder(case),
        target="cpu" if case.is_rehearsal else "gpu",
        on_start=lambda stage: print(f"export: {stage}", flush=True),
        on_done=lambda stage, result: print(f"export: {stage} done in {result.seconds:.0f} s", flush=True),
    )


def has_cuda() -> bool:
    """Say whether ONNX Runtime is there, and was built for GPUs."""
    if not importlib.util.find_spec("onnxruntime"):
        return False
    import onnxruntime

    return CUDA in onnxruntime.get_available_providers()
