"""A stand-in for the model `jobs`: it reads what `toy_generator` writes, and leaves a file for each cancellation."""

import hashlib
import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils

LIVE = ("queued", "denoising", "decoding")


class TritonPythonModel:
    """The contract's inputs and outputs."""

    def initialize(self, args):
        self.board = Path(args["model_repository"]).parent / "toy_generator" / "board"

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        request_id = pb_utils.get_input_tensor_by_name(request, "request_id").as_numpy()[0]
        if not 1 <= len(request_id) <= 128:
            words = f"[INVALID_ARG] request_id must have 1 to 128 bytes; got {len(request_id)}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(words, pb_utils.TritonError.INVALID_ARG))
        action = pb_utils.get_input_tensor_by_name(request, "action")
        entry = self.board / hashlib.sha256(request_id).hexdigest()
        try:
            state, *numbers = json.loads(entry.read_text())
        except FileNotFoundError:
            state, numbers = "unknown", (0, 0, 0)
        if action is not None and action.as_numpy()[0] == b"cancel" and state in LIVE:
            entry.with_suffix(".cancel").touch()
        names = ("step", "total_steps", "requests_ahead")
        return pb_utils.InferenceResponse(
            [
                pb_utils.Tensor("state", np.array([state.encode()], np.object_)),
                *(pb_utils.Tensor(n, np.array([v], np.int32)) for n, v in zip(names, numbers, strict=True)),
            ]
        )
