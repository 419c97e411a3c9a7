"""What a `config.pbtxt` asks of ONNX Runtime, and whether an ONNX graph agrees with it.

The rules are those of Triton's native ONNX Runtime backend, so that a repository that loads here loads there as well:
an unknown or unsupported option is refused here, though, where the native backend would ignore it. This module imports
neither Triton nor ONNX Runtime.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
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
        arena_shrinkage: Devices whose memory is given back after each run, such as `cpu:0;gpu:0`; empty for none.
        cuda_options: Of ONNX Runtime's CUDA execution provider, by its names; for instances on a GPU alone.
    """

    model_filename: str
    max_batch_size: int
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    intra_op_thread_count: int = 0
    allow_spinning: bool = False
    arena_shrinkage: str = ""
    cuda_options: Mapping[str, str] = field(default_factory=dict)


def parse_config(config: Mapping[str, Any]) -> BackendConfig:
    """Read a model configuration, as Triton hands it over in JSON.

    Raises:
        ConfigError: An option is unknown, unsupported here, or has a value that it can't have.
    """
    _refuse_unsupported(config)
    parameters = {name: value["string_value"].strip() for name, value in config.get("parameters", {}).items()}
    accelerator = _cuda_accelerator(config)
    _refuse_unknown("parameter", parameters, (*_PARAMETERS, *_CUDA_PARAMETERS))
    _refuse_unknown("parameter of the accelerator 'cuda',", accelerator, _CUDA_ACCELERATOR)
    fields = _converted(parameters, _PARAMETERS)
    return BackendConfig(
        model_filename=config.get("default_model_filename") or DEFAULT_MODEL_FILENAME,
        max_batch_size=int(config.get("max_batch_size", 0)),
        inputs=_parse_tensors("input", config.get("input", [])),
        outputs=_parse_tensors("output", config.get("output", [])),
        cuda_options=_converted(parameters, _CUDA_PARAMETERS) | _converted(accelerator, _CUDA_ACCELERATOR),
        **{_FIELDS[name]: value for name, value in fields.items()},
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
        "optimization.execution_accelerators.cpu_execution_accelerator": _accelerators(config, "cpu"),
    }
    for name, value in nested.items():
        if value:
            raise ConfigError(f"config.pbtxt sets {name}, which the embedded onnxruntime backend doesn't support")


def _accelerators(config: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Return the entries of a device's accelerators, `gpu` or `cpu`."""
    accelerators = config.get("optimization", {}).get("execution_accelerators", {})
    return list(accelerators.get(f"{device}_execution_accelerator", []))


def _cuda_accelerator(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the parameters of the accelerator `cuda`, the only one that there may be."""
    parameters: dict[str, str] = {}
    for accelerator in _accelerators(config, "gpu"):
        if accelerator["name"] != "cuda":
            raise ConfigError(
                f"config.pbtxt sets optimization.execution_accelerators.gpu_execution_accelerator to "
                f"'{accelerator['name']}', and the embedded onnxruntime backend supports only 'cuda'"
            )
        parameters |= accelerator.get("parameters", {})
    return parameters


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


def _refuse_unknown(kind: str, values: Mapping[str, str], known: Collection[str]) -> None:
    for name in values.keys() - set(known):
        raise ConfigError(
            f"config.pbtxt has the unknown {kind} '{name}'; the embedded onnxruntime backend knows {', '.join(known)}"
        )


Convert = Callable[[str, str], Any]
"""From an option's name and its text to its value."""


def _converted(values: Mapping[str, str], conversions: Mapping[str, Convert]) -> dict[str, Any]:
    """Convert those of `values` that are among `conversions`."""
    return {name: convert(name, values[name]) for name, convert in conversions.items() if name in values}


def _text(_: str, value: str) -> str:
    return value


def _count(name: str, value: str) -> int:
    if not value.isdecimal():
        raise ConfigError(f"parameter '{name}' must be a whole number of 0 or more, and is '{value}'")
    return int(value)


def _bytes(name: str, value: str) -> str:
    if not _count(name, value):
        raise ConfigError(f"parameter '{name}' must be a number of bytes above 0, and is '{value}'")
    return value


def _switch(name: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ConfigError(f"parameter '{name}' must be 0 or 1, and is '{value}'")
    return value == "1"


def _switch_text(name: str, value: str) -> str:
    return str(int(_switch(name, value)))


def _numbered(*names: str) -> Convert:
    """Convert the number by which the native backend calls a value to the name by which ONNX Runtime does."""

    def convert(name: str, value: str) -> str:
        if value not in map(str, range(len(names))):
            meanings = ", ".join(f"{number} ({meaning})" for number, meaning in enumerate(names))
            raise ConfigError(f"parameter '{name}' must be one of {meanings}, and is '{value}'")
        return names[int(value)]

    return convert


# Each option has a user here: the committed configurations, docs/tuning.md or benchmarks/knobs.py.
_FIELDS = {
    "intra_op_thread_count": "intra_op_thread_count",
    SPINNING: "allow_spinning",
    SHRINKAGE: "arena_shrinkage",
}
_PARAMETERS: Mapping[str, Convert] = {"intra_op_thread_count": _count, SPINNING: _switch, SHRINKAGE: _text}

# Of the CUDA execution provider. The native backend overwrites these with its defaults wherever else they are written,
# without a word (https://github.com/triton-inference-server/server/issues/8808).
_CUDA_PARAMETERS: Mapping[str, Convert] = {
    "cudnn_conv_algo_search": _numbered("EXHAUSTIVE", "HEURISTIC", "DEFAULT"),
    "arena_extend_strategy": _numbered("kNextPowerOfTwo", "kSameAsRequested"),
    "gpu_mem_limit": _bytes,
}

# And the others of that provider, which it takes from the accelerator `cuda` alone.
_CUDA_ACCELERATOR: Mapping[str, Convert] = {"use_tf32": _switch_text, "prefer_nhwc": _switch_text}
