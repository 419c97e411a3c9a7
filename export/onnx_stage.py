"""Exports one PyTorch module as ONNX and checks the file against PyTorch in ONNX Runtime."""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import onnxruntime
import torch
from torch import Tensor, nn

from export.errors import VerificationError
from export.open_shapes import open_shapes

OPSET_VERSION = 18
IR_VERSION = 10
"""What the oldest supported server can load: Triton 24.10 has ONNX Runtime 1.19, which reads opset 21 and IR 10."""

MODEL_FILE = "model.onnx"
EXTERNAL_DATA_FROM_BYTES = 1_000_000_000
"""Weights from this size on go to a file of their own: a single ONNX file can't be larger than 2 GB."""

MAX_RELATIVE_ERROR = 1e-3
MAX_FP16_ERROR = 3e-2
MAX_FP16 = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class OnnxStage:
    """A stage of the pipeline that runs in ONNX Runtime.

    Attributes:
        name: The Triton model's name.
        module: What is exported. Its `forward` takes the inputs in the order of `example`.
        example: Inputs that the export traces, by tensor name.
        dynamic_axes: Per input, the names of the axes whose size may change.
        outputs: The names of the outputs.
        check: Inputs of other sizes, with which the file is verified.
        reference: Computes the right outputs from `check`; `module` itself where it's None.
        rewrite: Changes the exported graph before it is saved.
        max_relative_error: What the verification allows.
        max_activation: What the absolute values of all activations may be: the type's largest number.
    """

    name: str
    module: nn.Module
    example: Mapping[str, Tensor]
    dynamic_axes: Mapping[str, Mapping[int, str]]
    outputs: tuple[str, ...]
    check: Mapping[str, Tensor]
    reference: Callable[..., tuple[Tensor, ...] | Tensor] | None = None
    rewrite: Callable[[onnx_ir.Model], onnx_ir.Model] | None = None
    max_relative_error: float = MAX_RELATIVE_ERROR
    max_activation: float = float("inf")


def in_fp16(stage: OnnxStage) -> OnnxStage:
    """Return the stage with weights and computation in float16; inputs, outputs and the reference stay as they are."""
    reference = copy.deepcopy(stage.reference or stage.module)
    stage.module.half()
    stage.module.register_forward_pre_hook(_halve_inputs, with_kwargs=True)
    stage.module.register_forward_hook(_restore_outputs)
    return replace(stage, reference=reference, max_relative_error=MAX_FP16_ERROR, max_activation=MAX_FP16)


def _halve_inputs(_: nn.Module, arguments: Any, named: Any) -> Any:
    halved = {name: value.half() if value.is_floating_point() else value for name, value in named.items()}
    return arguments, halved


def _restore_outputs(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
    if isinstance(outputs, Tensor):
        return outputs.float()
    return tuple(output.float() if output.is_floating_point() else output for output in outputs)


def export_stage(stage: OnnxStage, folder: Path) -> float:
    """Write `model.onnx` (and `model.onnx.data`, if large) into `folder` and verify it.

    Returns:
        The largest relative error among the outputs: ||onnx - pytorch|| / ||pytorch||.

    Raises:
        VerificationError: The error is above the stage's `max_relative_error`, or an activation above its
            `max_activation`.
    """
    with torch.inference_mode(), _quiet():
        program = torch.onnx.export(
            stage.module,
            args=(),
            kwargs=dict(stage.example),
            input_names=list(stage.example),
            output_names=list(stage.outputs),
            dynamic_shapes={name: dict(stage.dynamic_axes.get(name, {})) for name in stage.example},
            opset_version=OPSET_VERSION,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    model = program.model  # type: ignore[union-attr]  # None only without dynamo
    model = stage.rewrite(model) if stage.rewrite else model
    del program
    open_shapes(model)
    save(model, folder / MODEL_FILE)
    del model
    return verify(stage, folder / MODEL_FILE)


def save(model: onnx_ir.Model, path: Path) -> None:
    """Save `model`, without the exporter's notes, which hold paths of this machine and source lines."""
    model.ir_version = IR_VERSION
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    external = f"{path.name}.data" if size >= EXTERNAL_DATA_FROM_BYTES else None
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx_ir.save(model, path, external_data=external)


def verify(stage: OnnxStage, path: Path) -> float:
    """Return the largest relative error of the ONNX file at `path` against PyTorch, on `stage.check`."""
    reference = stage.reference or stage.module
    with torch.inference_mode(), _watched(reference) as activations:
        expected = reference(**stage.check)
    # ONNX Runtime computes fp16 in float32 on a CPU, where what overflows on a GPU doesn't.
    if max(activations, default=0.0) > stage.max_activation:
        raise VerificationError(
            f"{stage.name}: activations of up to {max(activations):.1e} are above {stage.max_activation:.1e}, the "
            f"largest number of their type."
        )
    expected = (expected,) if isinstance(expected, Tensor) else expected
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    actual = session.run(list(stage.outputs), {name: tensor.numpy() for name, tensor in stage.check.items()})
    errors = {
        name: relative_error(got, want.numpy()) for name, got, want in zip(stage.outputs, actual, expected, strict=True)
    }
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] <= stage.max_relative_error:
        raise VerificationError(
            f"{stage.name}: output {worst} differs from PyTorch by {errors[worst]:.1e} (relative), more than "
            f"{stage.max_relative_error:.0e}."
        )
    return errors[worst]


@contextlib.contextmanager
def _watched(module: object) -> Iterator[list[float]]:
    """Collect the largest absolute value of each tensor that comes into a layer of a module or out of it."""
    found: list[float] = []

    def collect(_layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        floats = [value for value in (*inputs, output) if isinstance(value, Tensor) and value.is_floating_point()]
        found.extend(float(value.abs().max()) for value in floats)

    submodules = module.modules() if isinstance(module, nn.Module) else ()
    # Only what has no modules inside: others also pass masks along, with their type's lowest number.
    handles = [layer.register_forward_hook(collect) for layer in submodules if not any(layer.children())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return ||actual - expected|| / ||expected||; infinite where the shapes differ or a number isn't finite."""
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return float("inf")
    difference = np.linalg.norm(actual.astype(np.float64) - expected.astype(np.float64))
    return float(difference / max(float(np.linalg.norm(expected.astype(np.float64))), 1e-30))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress notes and deprecation warnings off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
