"""What it takes to make an exported graph the body of an ONNX Loop."""

from collections.abc import Sequence

import onnx_ir
from onnx_ir.tape import Tape


def typed_value(
    name: str, dtype: onnx_ir.DataType | None, shape: Sequence[int | str | onnx_ir.SymbolicDim]
) -> onnx_ir.Value:
    """Return a value to be a graph's input; float32 where `dtype` is None."""
    return onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(shape), type=onnx_ir.TensorType(dtype or onnx_ir.DataType.FLOAT)
    )


def take_nodes(graph: onnx_ir.Graph) -> tuple[list[onnx_ir.Node], list[onnx_ir.Value], list[onnx_ir.Value]]:
    """Take a graph apart: return its nodes, inputs and outputs, without the shapes, which change from pass to pass."""
    nodes, inputs, outputs = list(graph), list(graph.inputs), list(graph.outputs)
    graph.remove(nodes)
    graph.inputs.clear()
    graph.outputs.clear()
    graph.initializers.clear()
    for value in (*inputs, *outputs):
        value.shape = None
    return nodes, inputs, outputs


def make_body(
    iteration: onnx_ir.Value,
    carried: Sequence[onnx_ir.Value],
    nodes: Sequence[onnx_ir.Node],
    outputs: Sequence[onnx_ir.Value],
) -> onnx_ir.Graph:
    """Return a Loop's body; of its outputs, the first ones are the new carried values, and the rest is collected."""
    condition = typed_value("condition", onnx_ir.DataType.BOOL, [])
    tape = Tape()
    go_on = tape.op("Identity", [condition])
    everything = [*nodes, *tape.nodes]
    _name_the_new_values(everything, "step")
    return onnx_ir.Graph([iteration, condition, *carried], [go_on, *outputs], nodes=everything, name="step")


def run_loop(
    tape: Tape, count: onnx_ir.Value, carried: Sequence[onnx_ir.Value], body: onnx_ir.Graph
) -> Sequence[onnx_ir.Value]:
    """Run `body` `count` times; return the last carried values, and then what was collected, along a new first axis."""
    always = tape.op("Constant", [], {"value": onnx_ir.tensor(True)})
    return tape.op_multi_out("Loop", [count, always, *carried], {"body": body}, num_outputs=len(body.outputs) - 1)


def rebuilt(
    model: onnx_ir.Model,
    inputs: Sequence[onnx_ir.Value],
    outputs: Sequence[onnx_ir.Value],
    tape: Tape,
    weights: Sequence[onnx_ir.Value],
) -> onnx_ir.Model:
    """Return `model` with another graph around its weights, which a Loop's body sees from inside."""
    _name_the_new_values(tape.nodes, "loop")
    graph = onnx_ir.Graph(
        inputs,
        outputs,
        nodes=tape.nodes,
        initializers=weights,
        opset_imports=model.opset_imports,
        name=model.graph.name,
    )
    return onnx_ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _name_the_new_values(nodes: Sequence[onnx_ir.Node], prefix: str) -> None:
    """Name what has no name yet, apart from the names that the exporter gave."""
    values = [value for node in nodes for value in node.outputs if value.name is None]
    for index, value in enumerate(values):
        value.name = f"{prefix}_value_{index}"
