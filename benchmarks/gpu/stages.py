"""All stages but the UNet: in PyTorch, as diffusers computes them, and in ONNX Runtime, as they are served."""

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Memory
from benchmarks.gpu.repository import CUDA, STAGES, checkpoint_folder, has_cuda, repository_folder
from benchmarks.gpu.results import NotPossibleError, Results
from benchmarks.gpu.runner import wait_for
from benchmarks.stages import load_module, make_inputs, measure_stage
from export.checkpoint import Checkpoint
from export.demo_unet import TEXT_WIDTHS

HALF_NAMES = {"float16": "fp16", "bfloat16": "bf16"}


def stages(case: Case, results: Results) -> None:
    """Every stage but the UNet in PyTorch, as diffusers computes it, in float32 and in half precision."""
    wait_for(case, results, "checkpoint")
    found, device = Checkpoint.find(str(checkpoint_folder(case))), torch.device(case.device)
    short = {"float16": "fp16", "bfloat16": "bf16"}[case.half]
    arguments = argparse.Namespace(dtype=short, repeats=case.repeats, compile="")
    for stage, inputs in make_inputs(case.length_s, TEXT_WIDTHS[case.size][0]).items():
        module = load_module(found, stage)
        for way, samples, error in measure_stage(module, inputs, device, arguments):
            results.add(f"stage/{stage}/PyTorch, {way}", samples)
            results.add_fact(f"error of {stage}, {way}", error)
        run = partial(TorchStages(case, {stage: module}), stage, inputs)
        results.add_one(f"memory/{stage}/weights and activations in half", Memory(device).peak_of(run), "MiB")


class RunStage(Protocol):
    """Runs a stage: its name and inputs -> its outputs, in the order of its ONNX graph."""

    def __call__(self, stage: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run it."""


class TorchStages:
    """The stages as PyTorch's modules in half precision, on the case's device."""

    def __init__(self, case: Case, modules: Mapping[str, nn.Module]) -> None:
        self._half, self._device = getattr(torch, case.half), torch.device(case.device)
        self._modules = {stage: module.to(self._device, self._half) for stage, module in modules.items()}

    @torch.inference_mode()
    def __call__(self, stage: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run one stage; its outputs stay on the device."""
        outputs = self._modules[stage](
            **{
                name: tensor.to(self._device, self._half if tensor.is_floating_point() else None)
                for name, tensor in inputs.items()
            }
        )
        return (outputs,) if isinstance(outputs, Tensor) else outputs


class OnnxStages:
    """The exported stages in ONNX Runtime, on the case's device.

    Raises:
        NotPossibleError: ONNX Runtime can't use the GPU.
    """

    def __init__(self, case: Case) -> None:
        import onnxruntime

        if not (case.is_rehearsal or has_cuda()):
            raise NotPossibleError("onnxruntime-gpu isn't installed")
        options = {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        providers: list[Any] = ["CPUExecutionProvider"] if case.is_rehearsal else [(CUDA, options)]
        if not case.is_rehearsal:
            onnxruntime.preload_dlls()
        self._sessions, self._outputs = {}, {}
        for stage in STAGES:
            path = repository_folder(case) / stage / "1" / "model.onnx"
            session = onnxruntime.InferenceSession(str(path), providers=providers)
            if session.get_providers()[0] == "CPUExecutionProvider" and not case.is_rehearsal:
                raise NotPossibleError("onnxruntime-gpu can't use this GPU; its own message is in the output")
            self._sessions[stage] = session
            self._outputs[stage] = [output.name for output in session.get_outputs()]

    def __call__(self, stage: str, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Run one stage, from and to the CPU's memory."""
        given = {name: tensor.numpy() for name, tensor in inputs.items()}
        return tuple(map(torch.from_numpy, self._sessions[stage].run(self._outputs[stage], given)))
