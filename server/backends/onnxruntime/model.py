"""The Python-based backend `onnxruntime`: Triton's native ONNX Runtime backend, stood in for by the pip package."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# Triton has this folder on sys.path, but as the last one; ours go first.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from onnx_backend_config import ConfigError, parse_config
from onnx_backend_jobs import GivenUpError, JobBoards
from onnx_backend_session import OnnxSession, Request, is_device_lost, is_invalid_argument
from parent_death import end_with_parent

DEVICE_LOST_STATUS = 70


class TritonPythonModel:
    """Serves `<version>/model.onnx` (or `default_model_filename`) with the tensors that `config.pbtxt` names.

    Inputs and outputs have the names, types and dims of the graph; with `max_batch_size > 0` the first dimension is
    the batch, and the requests that Triton hands over together run as one.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the graph and check it against the configuration.

        Raises:
            TritonModelException: They disagree, or the configuration has an option that isn't understood.
        """
        end_with_parent()
        self._boards = JobBoards(args["model_name"], os.getppid(), pb_utils.Logger.log_warn)
        try:
            config = parse_config(json.loads(args["model_config"]))
            path = Path(args["model_repository"], args["model_version"], config.model_filename)
            self._session: OnnxSession | None = OnnxSession(path, config, _device_id(args))
        except ConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: Sequence[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request, in order, with its requested outputs or with its own error.

        Nothing is computed for those that nobody waits for any more.
        """
        if self._session is None:
            raise pb_utils.TritonModelException("the model has been unloaded")
        ids = [_id_of(request) for request in requests]
        given_up = [self._boards.given_up(request_id) for request_id in ids]
        wanted = [_request(request) for request, error in zip(requests, given_up, strict=True) if not error]
        computed = iter(self._session.run(wanted) if wanted else ())
        results = [error or next(computed) for error in given_up]
        _end_process_without_gpu(results)
        for request_id, result in zip(ids, results, strict=True):
            if isinstance(result, Exception) and not isinstance(result, GivenUpError):
                self._boards.end_failed(request_id, "INVALID_ARG" if is_invalid_argument(result) else "INTERNAL")
        return [_response(result) for result in results]

    def finalize(self) -> None:
        """Release the session and its memory."""
        self._session = None


def _device_id(args: dict[str, str]) -> int | None:
    """CUDA device of this instance, or None for the CPU. Triton has made KIND_AUTO one of both."""
    return int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else None


def _end_process_without_gpu(results: Sequence[object]) -> None:
    """End this process if the GPU has failed for good: only a new one can use it, and whoever runs Triton starts it."""
    for result in results:
        if isinstance(result, Exception) and is_device_lost(result):
            pb_utils.Logger.log_error(f"the GPU has failed, and this process ends: {result}")
            os._exit(DEVICE_LOST_STATUS)


def _id_of(request: pb_utils.InferenceRequest) -> str:
    """Return the request's id; an empty one if it isn't UTF-8, which Triton lets through over HTTP."""
    try:
        return request.request_id()
    except UnicodeDecodeError:
        return ""


def _request(request: pb_utils.InferenceRequest) -> Request:
    return Request(
        inputs={tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
        outputs=list(request.requested_output_names()),
    )


def _response(result: dict[str, Any] | Exception) -> pb_utils.InferenceResponse:
    if isinstance(result, Exception):
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(result), _code_of(result)))
    return pb_utils.InferenceResponse([pb_utils.Tensor(k, np.ascontiguousarray(v)) for k, v in result.items()])


def _code_of(error: Exception) -> int:
    if isinstance(error, GivenUpError):
        return pb_utils.TritonError.CANCELLED
    return pb_utils.TritonError.INVALID_ARG if is_invalid_argument(error) else pb_utils.TritonError.INTERNAL
