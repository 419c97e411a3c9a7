"""What a `config.pbtxt` asks of ONNX Runtime, and whether an ONNX graph agrees with it.

The rules are those of Triton's native ONNX Runtime backend, so that a repository that loads here loads there as well:
an unknown or unsupported option is refused here, though, where the native backend would ignore it. This module imports
neither Triton nor ONNX Runtime.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

# Triton's optimization.graph.level -> the name of an onnxruntime.GraphOptimizationLevel.
GRAPH_LEVELS = {-1: "ORT_ENABLE_BASIC", 0: "ORT_ENABLE_ALL", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
EXECUTION_MODES = {"0": "ORT_SEQUENTIAL", "1": "ORT_PARALLEL"}
CUDNN_ALGORITHM_SEARCHES = {"0": "EXHAUSTIVE", "1": "HEURISTIC", "2": "DEFAULT"}
ARENA_EXTEND_STRATEGIES = {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"}
BOOLEANS = {"1": True, "true": True, "on": True, "0": False, "false": False, "off": False}

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
        graph_level: Name of an `onnxruntime.GraphOptimizationLevel`.
        execution_mode: Name of an `onnxruntime.ExecutionMode`.
        intra_op_thread_count: Threads within one operator; 0 leaves it to ONNX Runtime (all cores).
        inter_op_thread_count: Threads across operators in parallel execution mode; 0 leaves it to ONNX Runtime.
        enable_mem_arena: CPU memory arena; None leaves it to ONNX Runtime (on).
        enable_mem_pattern: Memory planning by pattern; None leaves it to ONNX Runtime (on).
        session_entries: Session configuration entries, passed on as they are.
        run_entries: Run configuration entries, passed on as they are.
        cuda_options: Options of the CUDA execution provider, without the device.
    """

    model_filename: str
    max_batch_size: int
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    graph_level: str = "ORT_ENABLE_ALL"
    execution_mode: str = "ORT_SEQUENTIAL"
    intra_op_thread_count: int = 0
    inter_op_thread_count: int = 0
    enable_mem_arena: bool | None = None
    enable_mem_pattern: bool | None = None
    session_entries: Mapping[str, str] = field(default_factory=dict)
    run_entries: Mapping[str, str] = field(default_factory=dict)
    cuda_options: Mapping[str, str] = field(default_factory=dict)


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
        graph_level=_parse_graph_level(config.get("optimization", {})),
        **_parse_parameters(config.get("parameters", {}), _parse_accelerators(config)),
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
    if config.get("model_operations", {}).get("op_library_filename"):
        raise ConfigError("config.pbtxt sets model_operations, which the embedded onnxruntime backend doesn't support")


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


def _parse_graph_level(optimization: Mapping[str, Any]) -> str:
    level = int(optimization.get("graph", {}).get("level", 0))
    if level not in GRAPH_LEVELS:
        raise ConfigError(f"optimization.graph.level must be one of -1, 0, 1, 2, and is {level}")
    return GRAPH_LEVELS[level]


def _parse_accelerators(config: Mapping[str, Any]) -> dict[str, str]:
    """Options of the CUDA execution provider from `optimization.execution_accelerators`."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    if accelerators.get("cpu_execution_accelerator"):
        raise ConfigError(
            "config.pbtxt sets a cpu_execution_accelerator, and the embedded onnxruntime backend has none"
        )
    options: dict[str, str] = {}
    for accelerator in accelerators.get("gpu_execution_accelerator", []):
        if accelerator["name"] != "cuda":
            raise ConfigError(
                f"the gpu_execution_accelerator must be 'cuda' in the embedded onnxruntime backend, and is "
                f"'{accelerator['name']}'"
            )
        options.update(accelerator.get("parameters", {}))
    return options


def _parse_parameters(parameters: Mapping[str, Any], cuda_options: Mapping[str, str]) -> dict[str, Any]:
    fields: dict[str, Any] = {"session_entries": {}, "run_entries": {}, "cuda_options": dict(cuda_options)}
    for name, value in parameters.items():
        if name not in _PARAMETERS:
            raise ConfigError(
                f"config.pbtxt has the unknown parameter '{name}'; the onnxruntime backend knows "
                f"{', '.join(_PARAMETERS)}"
            )
        field_name, key, convert = _PARAMETERS[name]
        converted = convert(name, value["string_value"])
        if key:
            fields[field_name][key] = converted
        else:
            fields[field_name] = converted
    return fields


def _text(_: str, value: str) -> str:
    return value


def _count(name: str, value: str) -> int:
    if not value.strip().isdecimal():
        raise ConfigError(f"parameter '{name}' must be a whole number of 0 or more, and is '{value}'")
    return int(value)


def _boolean(name: str, value: str) -> bool:
    return bool(_choice(BOOLEANS)(name, value.strip().lower()))


def _choice(choices: Mapping[str, Any]) -> Callable[[str, str], Any]:
    def convert(name: str, value: str) -> Any:
        if value.strip() not in choices:
            raise ConfigError(f"parameter '{name}' must be one of {', '.join(choices)}, and is '{value}'")
        return choices[value.strip()]

    return convert


# Parameter -> field of BackendConfig, key inside it (where the field is a mapping), conversion of the string value.
_PARAMETERS: dict[str, tuple[str, str, Callable[[str, str], Any]]] = {
    "intra_op_thread_count": ("intra_op_thread_count", "", _count),
    "inter_op_thread_count": ("inter_op_thread_count", "", _count),
    "execution_mode": ("execution_mode", "", _choice(EXECUTION_MODES)),
    "enable_mem_arena": ("enable_mem_arena", "", _boolean),
    "enable_mem_pattern": ("enable_mem_pattern", "", _boolean),
    "memory.enable_memory_arena_shrinkage": ("run_entries", "memory.enable_memory_arena_shrinkage", _text),
    "session.intra_op.allow_spinning": ("session_entries", "session.intra_op.allow_spinning", _text),
    "session.use_device_allocator_for_initializers": (
        "session_entries",
        "session.use_device_allocator_for_initializers",
        _text,
    ),
    "cudnn_conv_algo_search": ("cuda_options", "cudnn_conv_algo_search", _choice(CUDNN_ALGORITHM_SEARCHES)),
    "gpu_mem_limit": ("cuda_options", "gpu_mem_limit", _text),
    "arena_extend_strategy": ("cuda_options", "arena_extend_strategy", _choice(ARENA_EXTEND_STRATEGIES)),
    "do_copy_in_default_stream": ("cuda_options", "do_copy_in_default_stream", _text),
}
