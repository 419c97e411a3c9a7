"""A stand-in for AudioLDM 2: sine waves, at once or step by step, or what the first prompt orders.

Where `num_inference_steps` is given, each step takes 20 ms, two requests are denoised at the same time, and the others
wait in the order of their arrival; the model `jobs` shows them, and can cancel them.

The first prompt is an order where its first word is one of these:
    fail CODE WORDS   fail with `TritonError(WORDS, TritonError.CODE)`
    raise WORDS       raise ValueError(WORDS), as a bug would
    echo              fail with INVALID_ARG and, as JSON, everything that arrived
    wait PATH         create the file PATH, then wait until it's gone (20 s at most)
"""

import hashlib
import json
import threading
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
    "guidance_start",
    "guidance_end",
    "audio_length_in_s",
    "num_waveforms_per_prompt",
    "seed",
    "scheduler",
    "eta",
)


STEP_S = 0.02
DECODING_S = 0.1
SLOTS = 2


class TritonPythonModel:
    """The contract's inputs and outputs; audio float32 [P x W, samples] at 16 kHz."""

    def initialize(self, args):
        self.board = Path(args["model_repository"]) / "board"
        self.board.mkdir(exist_ok=True)
        self.changed = threading.Condition()
        self.queue = []
        self.free_slots = SLOTS

    def execute(self, requests):
        for request in requests:
            inputs = read_inputs(request)
            if inputs["prompt"][0].startswith(b"raise "):
                raise ValueError(inputs["prompt"][0][6:].decode())
            call = (request.get_response_sender(), inputs, describe(request, inputs), request.request_id())
            threading.Thread(target=self.answer, args=call).start()

    def answer(self, sender, inputs, description, request_id):
        try:
            response = self.obey(inputs, description, request_id)
        except CancelledError:
            response = failure("[CANCELLED] The client gave up.", pb_utils.TritonError.CANCELLED)
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def obey(self, inputs, description, request_id):
        order, _, words = inputs["prompt"][0].decode().partition(" ")
        if order == "fail":
            code, _, words = words.partition(" ")
            return failure(words, getattr(pb_utils.TritonError, code))
        if order == "echo":
            return failure("[INVALID_ARG] " + description, pb_utils.TritonError.INVALID_ARG)
        if order == "wait":
            wait_while_exists(Path(words))
        elif "num_inference_steps" in inputs:
            if inputs["num_inference_steps"][0] < 1:
                return failure("[INVALID_ARG] num_inference_steps is out of bounds", pb_utils.TritonError.INVALID_ARG)
            self.denoise(Entry(self.board, request_id), int(inputs["num_inference_steps"][0]))
        return generate(inputs)

    def denoise(self, entry, total_steps):
        """Wait for a slot, then do the steps; raises CancelledError."""
        try:
            self.wait_for_slot(entry)
            try:
                for step in range(total_steps):
                    entry.write("denoising", step, total_steps, 0)
                    entry.sleep(STEP_S)
            finally:
                with self.changed:
                    self.free_slots += 1
                    self.changed.notify_all()
            entry.write("decoding", total_steps, total_steps, 0)
            entry.sleep(DECODING_S)
            entry.write("done", total_steps, total_steps, 0)
        except CancelledError:
            entry.write("cancelled", 0, total_steps, 0)
            raise

    def wait_for_slot(self, entry):
        with self.changed:
            self.queue.append(entry)
            try:
                while self.queue[0] is not entry or not self.free_slots:
                    entry.write("queued", 0, 0, self.queue.index(entry))
                    self.changed.wait(0.05)
                    entry.sleep(0)
                self.free_slots -= 1
            finally:
                self.queue.remove(entry)
                self.changed.notify_all()


class CancelledError(Exception):
    """Somebody has cancelled this request through `jobs`."""


class Entry:
    """What `jobs` sees of one request."""

    def __init__(self, board, request_id):
        self.path = board / hashlib.sha256(request_id.encode()).hexdigest()

    def write(self, *progress):
        temporary = self.path.with_suffix(".part")
        temporary.write_text(json.dumps(progress))
        temporary.replace(self.path)

    def sleep(self, seconds):
        time.sleep(seconds)
        if self.path.with_suffix(".cancel").exists():
            raise CancelledError


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
    scores = np.linspace(0.9, 0.1, rows) if per_prompt > 1 else np.full(rows, -2.0)
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
