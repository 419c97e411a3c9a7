"""What a `config.pbtxt` asks of ONNX Runtime, and whether an ONNX graph agrees with it.

The rules are those of Triton's native ONNX Runtime backend, so that a repository that loads here loads there as well:
an unknown or unsupported option is refused here, though, where the native backend would ignore it. This module imports
neither Triton nor ONNX Runtime.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

DEFAULT_MODEL_FILENAME = "model.onnx"

# Triton's data type -> the name of the same type in an ONNX Runtime signature. BF16 is left out: numpy has none.
ONNX_TYPES = {
    "TYPE_BOOL": "tensor(bool)",
    "TYPE_UINT8": "tensor(uint8)",
    "TYPE_UINT16": "tensor(uint16)",
    "TYPE_UINT32": "tensor(uint32)",
    "TYPE_UINT64": "tensor(uint64)",
    "TYPE_INT8": "tensor(int8)",
    "TYPE_INT16": "tensor(int16)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_STRING": "tensor(string)",
}

SHRINKAGE = "memory.enable_memory_arena_shrinkage"
SPINNING = "session.intra_op.allow_spinning"

_UNSUPPORTED_FIELDS = ("batch_input", "batch_output", "sequence_batching")
_UNSUPPORTED_TENSOR_FIELDS = ("reshape", "allow_ragged_batch", "is_shape_tensor")


class ConfigError(ValueError):
    """The configuration, or the graph that should agree with it, is wrong; the message is a sentence."""


@dataclass(frozen=True)
class TensorConfig:
    """One entry of `input` or `output` in a `config.pbtxt`; `dims` are without the batch dimension, -1 is any size."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class GraphTensor:
    """One input or output of an ONNX graph; `shape` has -1 for every size that is symbolic or unknown."""

    name: str
    onnx_type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class BackendConfig:
    """The part of a model's configuration that this backend acts on.

    Attributes:
        model_filename: The ONNX file's name inside the version folder.
        max_batch_size: 0 for a model without a batch dimension.
        inputs: In the configuration's order.
        outputs: In the configuration's order.
        intra_op_thread_count: Threads within one operator; 0 leaves it to ONNX Runtime (all cores).
        allow_spinning: Whether threads that have nothing to do wait actively.
        arena_shrinkage: Devices whose memory is given back after each run, such as `cpu:0`; empty for none.
    """

    model_filename: str
    max_batch_size: int
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    intra_op_thread_count: int = 0
    allow_spinning: bool = False
    arena_shrinkage: str = ""


def parse_config(config: Mapping[str, Any]) -> BackendConfig:
    """Read a model configuration, as Triton hands it over in JSON.

    Raises:
        ConfigError: An option is unknown, unsupported here, or has a value that it can't have.
    """
    _refuse_unsupported(config)
    return BackendConfig(
        model_filename=config.get("default_model_filename") or DEFAULT_MODEL_FILENAME,
        max_batch_size=int(config.get("max_batch_size", 0)),
        inputs=_parse_tensors("input", config.get("input", [])),
        outputs=_parse_tensors("output", config.get("output", [])),
        **_parse_parameters(config.get("parameters", {})),
    )


def check_signature(
    config: BackendConfig,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
    overridable: Sequence[GraphTensor],
) -> None:
    """Check that a graph has the tensors that the configuration promises.

    As in the native backend, a size in the graph must equal the configuration's; only an input's may be left open by
    the graph alone.

    Args:
        config: What `config.pbtxt` says.
        inputs: The graph's required inputs.
        outputs: The graph's outputs; the configuration may leave some of them out.
        overridable: The graph's inputs that have a default.

    Raises:
        ConfigError: A tensor is missing, or its type or shape differs; the sentence names it.
    """
    known_inputs = {tensor.name: tensor for tensor in (*inputs, *overridable)}
    configured = {tensor.name: tensor for tensor in config.inputs}
    for tensor in inputs:
        if tensor.name not in configured:
            raise ConfigError(f"the graph needs an input '{tensor.name}' that config.pbtxt doesn't have")
        if configured[tensor.name].optional:
            raise ConfigError(
                f"config.pbtxt says that input '{tensor.name}' is optional, and the graph always needs it"
            )
    for wanted in config.inputs:
        _check_tensor("input", wanted, known_inputs, config.max_batch_size, exact=False)
    known_outputs = {tensor.name: tensor for tensor in outputs}
    for wanted in config.outputs:
        _check_tensor("output", wanted, known_outputs, config.max_batch_size, exact=True)


def _check_tensor(
    kind: str, wanted: TensorConfig, graph: Mapping[str, GraphTensor], max_batch_size: int, *, exact: bool
) -> None:
    if wanted.name not in graph:
        raise ConfigError(
            f"config.pbtxt has an {kind} '{wanted.name}', and the graph has only {', '.join(sorted(graph)) or 'none'}"
        )
    found = graph[wanted.name]
    if ONNX_TYPES[wanted.data_type] != found.onnx_type:
        raise ConfigError(
            f"{kind} '{wanted.name}' is {wanted.data_type} in config.pbtxt, and {found.onnx_type} in the graph"
        )
    dims = (-1, *wanted.dims) if max_batch_size > 0 else wanted.dims
    if not _dims_agree(found.shape, dims, batched=max_batch_size > 0, exact=exact):
        batch = " (the first one is the batch, as max_batch_size > 0)" if max_batch_size > 0 else ""
        raise ConfigError(
            f"{kind} '{wanted.name}' has dims {_shape(dims)}{batch} in config.pbtxt, and {_shape(found.shape)} in the "
            f"graph; a size that is -1 in config.pbtxt must be symbolic in the graph{', and the reverse' * exact}"
        )


def _dims_agree(graph: Sequence[int], dims: Sequence[int], *, batched: bool, exact: bool) -> bool:
    if not graph and not batched:  # A scalar, which Triton writes as [ 1 ].
        return all(size == 1 for size in dims)
    if len(graph) != len(dims):
        return False
    return all(found == wanted or (found == -1 and not exact) for found, wanted in zip(graph, dims, strict=True))


def _shape(sizes: Sequence[int]) -> str:
    return f"[{', '.join(str(size) for size in sizes)}]"


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for name in _UNSUPPORTED_FIELDS:
        if config.get(name):
            raise ConfigError(f"config.pbtxt sets {name}, which the embedded onnxruntime backend doesn't support")
    nested = {
        "model_operations": config.get("model_operations", {}).get("op_library_filename"),
        "optimization.graph.level": int(config.get("optimization", {}).get("graph", {}).get("level", 0)),
        "optimization.execution_accelerators": config.get("optimization", {}).get("execution_accelerators"),
    }
    for name, value in nested.items():
        if value:
            raise ConfigError(f"config.pbtxt sets {name}, which the embedded onnxruntime backend doesn't support")


def _parse_tensors(kind: str, entries: Sequence[Mapping[str, Any]]) -> tuple[TensorConfig, ...]:
    return tuple(_parse_tensor(kind, entry) for entry in entries)


def _parse_tensor(kind: str, entry: Mapping[str, Any]) -> TensorConfig:
    for name in _UNSUPPORTED_TENSOR_FIELDS:
        if entry.get(name):
            raise ConfigError(
                f"{kind} '{entry['name']}' sets {name}, which the embedded onnxruntime backend doesn't support"
            )
    if entry["data_type"] not in ONNX_TYPES:
        raise ConfigError(
            f"{kind} '{entry['name']}' is {entry['data_type']}, and the embedded onnxruntime backend has only "
            f"{', '.join(ONNX_TYPES)}"
        )
    dims = tuple(int(size) for size in entry["dims"])
    return TensorConfig(entry["name"], entry["data_type"], dims, bool(entry.get("optional", False)))


def _parse_parameters(parameters: Mapping[str, Any]) -> dict[str, Any]:
    fields = {}
    for name, value in parameters.items():
        if name not in _PARAMETERS:
            raise ConfigError(
                f"config.pbtxt has the unknown parameter '{name}'; the embedded onnxruntime backend knows "
                f"{', '.join(_PARAMETERS)}"
            )
        field_name, convert = _PARAMETERS[name]
        fields[field_name] = convert(name, value["string_value"].strip())
    return fields


def _text(_: str, value: str) -> str:
    return value


def _count(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ConfigError(f"parameter '{name}' must be a whole number of 0 or more, and is '{value}'")
    return int(value)


def _switch(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ConfigError(f"parameter '{name}' must be 0 or 1, and is '{value}'")
    return value == "1"


# Parameter -> field of BackendConfig, conversion of the string value. Each of them has a user here: the committed
# configurations, docs/tuning.md or benchmarks/knobs.py.
_PARAMETERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "intra_op_thread_count": ("intra_op_thread_count", _count),
    SPINNING: ("allow_spinning", _switch),
    SHRINKAGE: ("arena_shrinkage", _text),
}
