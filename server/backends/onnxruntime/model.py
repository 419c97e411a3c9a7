"""The Python-based backend `onnxruntime`: Triton's native ONNX Runtime backend, stood in for by the pip package."""

from __future__ import annotations  # Triton's classes are in its module only after this one is imported

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

# Triton has this folder on sys.path, but as the last one; ours go first.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from onnx_backend_config import ConfigError, parse_config
from onnx_backend_session import OnnxSession, Request, has_cuda, is_invalid_argument


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
        try:
            config = parse_config(json.loads(args["model_config"]))
            path = Path(args["model_repository"], args["model_version"], config.model_filename)
            self._session: OnnxSession | None = OnnxSession(path, config, _device_id(args))
        except ConfigError as error:
            raise pb_utils.TritonModelException(str(error)) from error

    def execute(self, requests: Sequence[pb_utils.InferenceRequest]) -> list[pb_utils.InferenceResponse]:
        """Answer each request, in order, with its requested outputs or with its own error."""
        if self._session is None:
            raise pb_utils.TritonModelException("the model has been unloaded")
        return [_response(result) for result in self._session.run([_request(request) for request in requests])]

    def finalize(self) -> None:
        """Release the session and its memory."""
        self._session = None


def _device_id(args: dict[str, str]) -> int | None:
    """CUDA device of this instance, or None for the CPU."""
    if args["model_instance_kind"] != "GPU":
        return None
    if has_cuda():
        return int(args["model_instance_device_id"])
    pb_utils.Logger.log_warn(
        f"{args['model_name']}: the installed onnxruntime has no CUDA, so this model runs on the CPU; "
        f"`pip install onnxruntime-gpu` in its place to use the GPU"
    )
    return None


def _request(request: pb_utils.InferenceRequest) -> Request:
    return Request(
        inputs={tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
        outputs=list(request.requested_output_names()),
    )


def _response(result: dict[str, Any] | Exception) -> pb_utils.InferenceResponse:
    if isinstance(result, Exception):
        error = pb_utils.TritonError
        code = error.INVALID_ARG if is_invalid_argument(result) else error.INTERNAL
        return pb_utils.InferenceResponse(error=error(str(result), code))
    return pb_utils.InferenceResponse([pb_utils.Tensor(k, np.ascontiguousarray(v)) for k, v in result.items()])
