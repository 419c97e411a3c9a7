"""A stand-in for AudioLDM 2: sine waves at once, or what the first prompt orders.

The first prompt is an order where its first word is one of these:
    fail CODE WORDS   fail with `TritonError(WORDS, TritonError.CODE)`
    raise WORDS       raise ValueError(WORDS), as a bug would
    echo              fail with INVALID_ARG and, as JSON, everything that arrived
    wait PATH         create the file PATH, then wait until it's gone (20 s at most)
"""

import json
import time
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

SAMPLING_RATE = 16000
INPUTS = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "audio_length_in_s",
    "num_waveforms_per_prompt",
    "seed",
    "scheduler",
    "eta",
)


class TritonPythonModel:
    """The contract's inputs and outputs; audio float32 [P x W, samples] at 16 kHz."""

    def execute(self, requests):
        return [answer(request) for request in requests]


def answer(request):
    inputs = read_inputs(request)
    order, _, words = inputs["prompt"][0].decode().partition(" ")
    if order == "raise":
        raise ValueError(words)
    if order == "fail":
        code, _, words = words.partition(" ")
        return failure(words, getattr(pb_utils.TritonError, code))
    if order == "echo":
        return failure("[INVALID_ARG] " + describe(request, inputs), pb_utils.TritonError.INVALID_ARG)
    if order == "wait":
        wait_while_exists(Path(words))
    return generate(inputs)


def read_inputs(request):
    tensors = ((name, pb_utils.get_input_tensor_by_name(request, name)) for name in INPUTS)
    return {name: tensor.as_numpy() for name, tensor in tensors if tensor is not None}


def describe(request, inputs):
    values = {
        name: [item.decode() if isinstance(item, bytes) else item for item in array.tolist()]
        for name, array in inputs.items()
    }
    dtypes = {name: str(array.dtype) for name, array in inputs.items()}
    return json.dumps({"id": request.request_id(), "timeout_us": request.timeout(), "values": values, "dtypes": dtypes})


def wait_while_exists(path):
    path.touch()
    end = time.monotonic() + 20
    while path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def generate(inputs):
    per_prompt = int(inputs.get("num_waveforms_per_prompt", [1])[0])
    rows = len(inputs["prompt"]) * per_prompt
    samples = int(float(inputs.get("audio_length_in_s", [1.0])[0]) * SAMPLING_RATE)
    time_s = np.arange(samples, dtype=np.float32) / SAMPLING_RATE
    audio = np.stack([0.5 * np.sin(2 * np.pi * 220 * (row + 1) * time_s) for row in range(rows)]).astype(np.float32)
    scores = np.linspace(0.9, 0.1, rows) if per_prompt > 1 else np.full(rows, np.nan)
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor("audio", audio),
            pb_utils.Tensor("sampling_rate", np.array([SAMPLING_RATE], np.int32)),
            pb_utils.Tensor("used_seed", np.array([inputs.get("seed", [1234])[0]], np.int64)),
            pb_utils.Tensor("clap_score", scores.astype(np.float32)),
            pb_utils.Tensor("truncated_tokens", np.array([len(text) // 512 for text in inputs["prompt"]], np.int32)),
        ]
    )


def failure(words, code):
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(words, code))
