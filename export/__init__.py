"""Turns an AudioLDM 2 checkpoint in diffusers' layout into the weights of the Triton model repository."""

import os

# ONNX Runtime's pip package reports its use to its maker otherwise.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
