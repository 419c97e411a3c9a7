"""Nodes that the hand-made parts of the graphs share."""

import onnx_ir
from onnx_ir.tape import Tape


def integers(tape: Tape, value: int | list[int]) -> onnx_ir.Value:
    """Return an int64 constant: a scalar, or a vector."""
    return tape.op("Constant", [], {"value": onnx_ir.tensor(value, dtype=onnx_ir.DataType.INT64)})
