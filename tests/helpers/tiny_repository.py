"""Tiny models for the tests of the embedded server, built with onnx.helper, and what they leave behind."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory

INSTANCE = "instance_group { count: 1 kind: KIND_AUTO }\n"


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, tuple[Any, Any]],
    outputs: Mapping[str, tuple[Any, Any]],
    initializers: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    """An ONNX model; `inputs` and `outputs` map names to (element type, shape)."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "tiny",
            [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
            [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
            list(initializers),
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=9,
    )


def double_graph() -> onnx.ModelProto:
    """Y = 2 x, float32 [batch, 3]."""
    shape = (TensorProto.FLOAT, ["batch", 3])
    return graph([helper.make_node("Add", ["x", "x"], ["y"])], {"x": shape}, {"y": shape})


def lookup_graph() -> onnx.ModelProto:
    """Y = a row of a table of ten for each index, rows = the size of the whole batch; an index over 9 is an error."""
    constants = {"table": np.arange(30, dtype=np.float32).reshape(10, 3), "zero": np.array([0]), "one": np.array([1])}
    nodes = [
        helper.make_node("Squeeze", ["index", "one"], ["x"]),
        helper.make_node("Gather", ["table", "x"], ["y"], axis=0),
        helper.make_node("Shape", ["x"], ["count"]),
        helper.make_node("Mul", ["index", "zero"], ["zeros"]),
        helper.make_node("Add", ["zeros", "count"], ["rows"]),
    ]
    column = (TensorProto.INT64, ["batch", 1])
    outputs = {"y": (TensorProto.FLOAT, ["batch", 3]), "rows": column}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return graph(nodes, {"index": column}, outputs, initializers)


def string_graph() -> onnx.ModelProto:
    """Y = x, strings [n]; size = a scalar."""
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Size", ["x"], ["size"])]
    strings = (TensorProto.STRING, ["n"])
    return graph(nodes, {"x": strings}, {"y": strings, "size": (TensorProto.INT64, [])})


def add_onnx_model(repository: Path, name: str, model: onnx.ModelProto, config: str) -> Path:
    """Put an ONNX model into a repository; returns its folder."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    onnx.save(model, version / "model.onnx")
    (version.parent / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{INSTANCE}{config}')
    return version.parent


def add_python_model(repository: Path, name: str, code: str, config: str) -> Path:
    """Put a Python model into a repository; returns its folder."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(code)
    (version.parent / "config.pbtxt").write_text(f'backend: "python"\n{INSTANCE}{config}')
    return version.parent


SLOW_CODE = """
import time


class TritonPythonModel:
    def initialize(self, args):
        time.sleep(600)
"""

DOUBLE_CONFIG = """max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
"""

LOOKUP_CONFIG = """max_batch_size: 4
input { name: "index" data_type: TYPE_INT64 dims: [ 1 ] }
output { name: "y" data_type: TYPE_FP32 dims: [ 3 ] }
output { name: "rows" data_type: TYPE_INT64 dims: [ 1 ] }
dynamic_batching { preferred_batch_size: [ 4 ] max_queue_delay_microseconds: 3000000 }
"""

STRING_CONFIG = """input { name: "x" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "y" data_type: TYPE_STRING dims: [ -1 ] }
output { name: "size" data_type: TYPE_INT64 dims: [ 1 ] }
"""


def tensors(x: str, y: str) -> str:
    """One input and one output, for a config.pbtxt."""
    return f'input {{ name: "x" data_type: {x} }}\noutput {{ name: "y" data_type: {y} }}\n'


def add_double(repository: Path, name: str = "double", config: str = DOUBLE_CONFIG) -> Path:
    """The model that most tests need."""
    return add_onnx_model(repository, name, double_graph(), config)


def add_chain(repository: Path, name: str, tensors: str, steps: Sequence[tuple[str, str, str]]) -> Path:
    """An ensemble; each step is a model, its input map and its output map, as `model_tensor=ensemble_tensor`."""
    (repository / name / "1").mkdir(parents=True)

    def mapping(kind: str, pair: str) -> str:
        key, _, value = pair.partition("=")
        return f'{kind}_map {{ key: "{key}" value: "{value}" }}'

    body = "\n".join(
        f'step {{ model_name: "{model}" model_version: -1 {mapping("input", i)} {mapping("output", o)} }}'
        for model, i, o in steps
    )
    config = f'platform: "ensemble"\n{tensors}ensemble_scheduling {{\n{body}\n}}\n'
    (repository / name / "config.pbtxt").write_text(config)
    return repository / name


def processes_of(directory: Path) -> dict[int, str]:
    """Processes, zombies left out, whose command line names a folder."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(directory) in command:
                found[int(entry.name)] = command
    return found


def shared_memory_of(runner_pid: int) -> list[str]:
    """Names of the shared memory regions that belong to a runner."""
    return [entry.name for entry in SHARED_MEMORY.glob(f"triton_python_backend_shm_region_*_{runner_pid}_*")]


def children_of(pid: int, word: str) -> list[int]:
    """Process ids of a process's children whose command line has a word."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [int(child) for file in children for child in file.read_text().split()]
    return [pid for pid in pids if word in Path(f"/proc/{pid}/cmdline").read_text()]


def unix_sockets_of(pid: int) -> list[str]:
    """Paths of the Unix sockets that a process listens on."""
    links = [entry.readlink().name for entry in Path(f"/proc/{pid}/fd").iterdir() if entry.is_symlink()]
    inodes = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    return [fields[7] for fields in lines if len(fields) > 7 and fields[6] in inodes and fields[7].startswith("/")]
