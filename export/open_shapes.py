"""Makes the sizes of a graph's inputs and outputs open, so that one committed config.pbtxt serves every checkpoint.

Triton's native ONNX Runtime backend compares a model's configuration with the shapes that ONNX Runtime reports: a -1 in
the configuration is refused where the graph has a number. A size may be declared open, but ONNX Runtime infers an
output's widths from the weights. So each output passes through a Slice to a bound that depends on the input's data,
which shape inference can't see through. The bound is always beyond the end: all of the output comes through.
"""

import onnx_ir
from onnx_ir.tape import Tape

from export.onnx_nodes import integers

BEYOND_ANY_SIZE = 2**40


def open_shapes(model: onnx_ir.Model) -> None:
    """Change `model` so that ONNX Runtime reports no fixed size for any input or output."""
    graph = model.graph
    for value in graph.inputs:
        value.shape = _open(value)
    for index, value in enumerate(graph.outputs):
        axes = [axis for axis, size in enumerate(_sizes(value)) if isinstance(size, int)]
        if axes:
            graph.outputs[index] = _sliced(graph, value, axes)


def _sliced(graph: onnx_ir.Graph, value: onnx_ir.Value, axes: list[int]) -> onnx_ir.Value:
    name, value.name = value.name, f"{value.name}_unsliced"
    tape = Tape()
    count = tape.op("Reshape", [tape.op("Size", [graph.inputs[0]]), integers(tape, [1])])
    bound = tape.op("Add", [count, integers(tape, [BEYOND_ANY_SIZE])])
    ends = tape.op("Expand", [bound, integers(tape, [len(axes)])])
    sliced = tape.op("Slice", [value, integers(tape, [0] * len(axes)), ends, integers(tape, axes)])
    sliced.name, sliced.type, sliced.shape = name, value.type, _open(value, name)
    for position, node in enumerate(tape.nodes):
        for output in node.outputs:
            output.name = output.name if output is sliced else f"{name}_slice_{position}"
    graph.extend(tape.nodes)
    return sliced


def _open(value: onnx_ir.Value, name: str | None = None) -> onnx_ir.Shape:
    name = name or value.name
    return onnx_ir.Shape(f"{name}_{axis}" if isinstance(size, int) else size for axis, size in enumerate(_sizes(value)))


def _sizes(value: onnx_ir.Value) -> list[int | onnx_ir.SymbolicDim]:
    if value.shape is None:
        raise ValueError(f"The exported graph doesn't tell the shape of {value.name}.")
    return list(value.shape)
