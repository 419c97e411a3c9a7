"""Runs an exported graph on one row after the other, so that its memory doesn't grow with the number of rows."""

import onnx_ir
from onnx_ir.tape import Tape

from export.loop_body import make_body, rebuilt, run_loop, take_nodes, typed_value
from export.onnx_nodes import integers


def row_by_row(model: onnx_ir.Model) -> onnx_ir.Model:
    """Make a model that runs the graph of `model`, with one input and one output, on each row of the input."""
    weights = list(model.graph.initializers.values())
    (one,), (result,) = model.graph.inputs, model.graph.outputs
    rows = typed_value(str(one.name), one.dtype, list(one.shape))  # type: ignore[arg-type]  # has a shape
    name, dtype, shape = str(result.name), result.type, result.shape
    tape = Tape()
    count = tape.op("Squeeze", [tape.op("Shape", [rows], {"start": 0, "end": 1})])
    (collected,) = run_loop(tape, count, [], _row_body(model.graph, rows))
    joined = tape.op("Squeeze", [collected, integers(tape, [1])])
    joined.name, joined.type, joined.shape = name, dtype, shape
    return rebuilt(model, [rows], [joined], tape, weights)


def _row_body(graph: onnx_ir.Graph, rows: onnx_ir.Value) -> onnx_ir.Graph:
    nodes, (one,), (result,) = take_nodes(graph)
    iteration = typed_value("iteration", onnx_ir.DataType.INT64, [])
    tape = Tape()
    row = tape.op("Gather", [rows, tape.op("Unsqueeze", [iteration, integers(tape, [0])])], {"axis": 0})
    one.replace_all_uses_with(row)
    return make_body(iteration, [], [*tape.nodes, *nodes], [result])
