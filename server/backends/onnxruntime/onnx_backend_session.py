"""An ONNX Runtime session that serves Triton's requests: loaded after the configuration, run in batches.

This module never imports `triton_python_backend_utils`, so that it can be tested without a server.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnx_backend_config import SHRINKAGE, SPINNING, BackendConfig, ConfigError, GraphTensor, check_signature

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
Run = Callable[[Arrays, Sequence[str]], dict[str, Array]]

CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"

# CUDA's errors after which a process can't use the GPU any more (CUDA's cudaError_t), in ONNX Runtime's words.
_DEVICE_LOST = re.compile(r"CUDA failure (214|700|702|709|710|71[4-9]|721):")

_RUN_ON_THE_CPU = "or write KIND_CPU into the instance_group of its config.pbtxt, to run it on the CPU"


@dataclass(frozen=True)
class Request:
    """One inference request: its input tensors by name, and the names of the outputs that it asks for."""

    inputs: Arrays
    outputs: Sequence[str]


class OnnxSession:
    """An ONNX file, loaded and checked against its configuration.

    Args:
        path: The ONNX file.
        config: The model's configuration.
        device_id: CUDA device to run on; None runs on the CPU.

    Raises:
        ConfigError: The file is missing, disagrees with the configuration, or the CUDA device can't be used: nothing
            runs on the CPU that was to run on a GPU.
    """

    def __init__(self, path: Path, config: BackendConfig, device_id: int | None = None) -> None:
        if path.is_dir():  # As in the native backend: a folder of that name holds the file and its external data.
            path = path / "model.onnx"
        if not path.is_file():
            raise ConfigError(f"{path} is missing")
        self._config = config
        # Without the fallback, by which a run that fails on the GPU would move the session to the CPU for good.
        self._session = onnxruntime.InferenceSession(
            str(path), session_options(config), providers=execution_providers(config, device_id), enable_fallback=0
        )
        if device_id is not None and CUDA not in self._session.get_providers():
            raise ConfigError(
                f"ONNX Runtime can't use CUDA device {device_id}, see its message in the log; it needs the CUDA and "
                f"cuDNN of `pip install onnxruntime-gpu[cuda,cudnn]`; {_RUN_ON_THE_CPU}"
            )
        self._run_options = run_options(config)
        graph_inputs = _graph_tensors(self._session.get_inputs())
        graph_outputs = _graph_tensors(self._session.get_outputs())
        overridable = _graph_tensors(self._session.get_overridable_initializers())
        check_signature(config, graph_inputs, graph_outputs, overridable)
        scalars = {tensor.name for tensor in (*graph_inputs, *graph_outputs, *overridable) if not tensor.shape}
        self._scalar_inputs = {tensor.name for tensor in config.inputs if tensor.name in scalars}
        self._scalar_output_dims = {tensor.name: tensor.dims for tensor in config.outputs if tensor.name in scalars}
        self._string_inputs = {tensor.name for tensor in config.inputs if tensor.data_type == "TYPE_STRING"}

    def run(self, requests: Sequence[Request]) -> list[dict[str, Array] | Exception]:
        """Run requests, together where the model has a batch dimension and their other dimensions agree.

        Returns:
            For each request its outputs by name, or the exception that it, and it alone, has met.
        """
        return run_in_batches(requests, self._run_one, batched=self._config.max_batch_size > 0)

    def _run_one(self, inputs: Arrays, outputs: Sequence[str]) -> dict[str, Array]:
        feed = {name: self._to_onnx(name, array) for name, array in inputs.items()}
        results = self._session.run(list(outputs), feed, self._run_options)
        return {name: self._to_triton(name, result) for name, result in zip(outputs, results, strict=True)}

    def _to_onnx(self, name: str, array: Array) -> Array:
        if name in self._string_inputs:
            array = np.array([item.decode() for item in array.flat], dtype=object).reshape(array.shape)
        return array.reshape(()) if name in self._scalar_inputs else array

    def _to_triton(self, name: str, result: Any) -> Array:
        array = np.asarray(result)
        if array.dtype == np.object_:
            array = np.array([item.encode() for item in array.flat], dtype=object).reshape(array.shape)
        return array.reshape(self._scalar_output_dims[name]) if name in self._scalar_output_dims else array


def run_in_batches(requests: Sequence[Request], run: Run, *, batched: bool) -> list[dict[str, Array] | Exception]:
    """Run requests in as few calls as possible, and keep their failures apart.

    Requests whose inputs have equal names, types and dimensions after the first are joined along the first. If their
    common run fails, each of them runs alone, so that only the culprit fails.

    Args:
        requests: What Triton handed over in one call.
        run: Computes the outputs of the given names.
        batched: Whether the first dimension of each tensor is the batch.

    Returns:
        For each request its outputs by name, or its exception.
    """
    results: list[dict[str, Array] | Exception] = [RuntimeError("not run")] * len(requests)
    for group in _groups(requests) if batched else [[index] for index in range(len(requests))]:
        answers = _run_joined([requests[index] for index in group], run) if len(group) > 1 else None
        for position, index in enumerate(group):
            results[index] = answers[position] if answers else _run_alone(requests[index], run, batched=batched)
    return results


def _groups(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of the requests that can be joined, in their order."""
    groups: dict[Any, list[int]] = {}
    for index, request in enumerate(requests):
        key = tuple(sorted((name, array.dtype.str, array.shape[1:]) for name, array in request.inputs.items()))
        groups.setdefault(key, []).append(index)
    return list(groups.values())


def _run_joined(requests: Sequence[Request], run: Run) -> list[dict[str, Array]] | None:
    """Outputs of each of several requests, or None if they could not be computed together."""
    names = list(requests[0].inputs)
    outputs = list(dict.fromkeys(name for request in requests for name in request.outputs))
    rows = [_row_count(request.inputs) for request in requests]
    try:
        joined = run({name: np.concatenate([r.inputs[name] for r in requests]) for name in names}, outputs)
        _check_rows(joined, sum(rows))
    except Exception:
        return None
    ends = np.cumsum(rows)
    return [
        {name: joined[name][end - count : end] for name in request.outputs}
        for request, count, end in zip(requests, rows, ends, strict=True)
    ]


def _run_alone(request: Request, run: Run, *, batched: bool) -> dict[str, Array] | Exception:
    try:
        outputs = run(request.inputs, request.outputs)
        if batched:
            _check_rows(outputs, _row_count(request.inputs))
    except Exception as error:
        return error
    return outputs


def _row_count(inputs: Arrays) -> int:
    return len(next(iter(inputs.values())))


def _check_rows(outputs: Arrays, rows: int) -> None:
    for name, array in outputs.items():
        if array.shape[:1] != (rows,):
            raise RuntimeError(f"output '{name}' has shape {list(array.shape)} for a batch of {rows}")


def session_options(config: BackendConfig) -> Any:
    """Translate a configuration; what it doesn't set keeps the default of ONNX Runtime, but for spinning."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = config.intra_op_thread_count
    # Threads that wait actively take the cores from the stages of other requests (docs/tuning.md).
    options.add_session_config_entry(SPINNING, str(int(config.allow_spinning)))
    return options


def run_options(config: BackendConfig) -> Any:
    """Translate what a configuration asks of each run."""
    options = onnxruntime.RunOptions()
    if config.arena_shrinkage:
        options.add_run_config_entry(SHRINKAGE, config.arena_shrinkage)
    return options


def execution_providers(config: BackendConfig, device_id: int | None) -> list[str | tuple[str, dict[str, str]]]:
    """Return ONNX Runtime's execution providers for a device, the preferred one first; None is the CPU.

    Raises:
        ConfigError: The device is a GPU, and the installed ONNX Runtime is the one without CUDA.
    """
    if device_id is None:
        return [CPU]
    if not has_cuda():
        raise ConfigError(
            f"this instance is to run on GPU {device_id}, and the installed onnxruntime has no CUDA; install the one "
            f"that has it (`make ACCELERATOR=gpu`, or `pip install onnxruntime-gpu` in its place); {_RUN_ON_THE_CPU}"
        )
    onnxruntime.preload_dlls()
    return [(CUDA, {"device_id": str(device_id), **config.cuda_options}), CPU]


def has_cuda() -> bool:
    """Return whether the installed ONNX Runtime is the one with CUDA."""
    return CUDA in onnxruntime.get_available_providers()


def is_invalid_argument(error: Exception) -> bool:
    """Return whether the request caused a failure: ONNX Runtime says so, or its text is not UTF-8."""
    return isinstance(error, onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument | UnicodeDecodeError)


def is_device_lost(error: Exception) -> bool:
    """Return whether the GPU has failed so that whatever this process asks of it from now on fails as well."""
    return _DEVICE_LOST.search(str(error)) is not None


def _graph_tensors(nodes: Sequence[Any]) -> list[GraphTensor]:
    return [
        GraphTensor(node.name, node.type, tuple(size if isinstance(size, int) else -1 for size in node.shape))
        for node in nodes
    ]
