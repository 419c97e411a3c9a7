"""Reads the committed `config.pbtxt` files as Triton does, and its answers as a browser does."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

REPOSITORY = Path(__file__).resolve().parents[2] / "model_repository"


INPUT_TYPES = {
    "prompt": ("BYTES", np.object_),
    "negative_prompt": ("BYTES", np.object_),
    "num_inference_steps": ("INT32", np.int32),
    "guidance_scale": ("FP32", np.float32),
    "guidance_start": ("FP32", np.float32),
    "guidance_end": ("FP32", np.float32),
    "audio_length_in_s": ("FP32", np.float32),
    "num_waveforms_per_prompt": ("INT32", np.int32),
    "seed": ("INT64", np.int64),
    "scheduler": ("BYTES", np.object_),
    "eta": ("FP32", np.float32),
}
"""Triton's and numpy's type of each public input, as the contract says."""


def read_configs() -> dict[str, ModelConfig]:
    """Return every model's configuration, by folder name."""
    return {
        path.parent.name: text_format.Parse(path.read_text(), ModelConfig())
        for path in sorted(REPOSITORY.glob("*/config.pbtxt"))
    }


def read_parameters(model: str) -> dict[str, str]:
    """Return the parameters of a model's configuration that are its own: all but the names of other models."""
    parameters = {name: value.string_value for name, value in sorted(read_configs()[model].parameters.items())}
    return {name: value for name, value in parameters.items() if not name.endswith("_model")}


def load_json(text: bytes) -> Any:
    """Parse JSON as its standard has it, without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


def signature(tensors: Iterable[Any], max_batch_size: int = 0) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return data type and full dims, the batch dimension included, of each tensor."""
    batch = (-1,) if max_batch_size else ()
    return {tensor.name: (DataType.Name(tensor.data_type), batch + tuple(tensor.dims)) for tensor in tensors}
