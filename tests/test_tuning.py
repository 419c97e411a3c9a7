"""The commands of docs/tuning.md, in their order, and a server over what they make."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from audioldm2_client import AudioLDM2Client

from export.onnx_stage import relative_error
from server import EmbeddedServer

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[1]


def test_a_repository_in_half_precision_with_stages_on_the_cpu_serves_nearly_the_same_audio(
    triton, demo_checkpoint, tmp_path
):
    half = tmp_path / "half"
    commands = re.findall(r"^\$ (.*)$", (ROOT / "docs" / "tuning.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        line = command.replace(".venv/bin/python", shlex.quote(sys.executable))
        line = line.replace(".demo/checkpoint", shlex.quote(str(demo_checkpoint)))
        line = line.replace(".demo/half", shlex.quote(str(half)))
        subprocess.run(["bash", "-c", line], cwd=ROOT, check=True, timeout=240)  # noqa: S607
    assert (half / "vae" / "config.pbtxt").read_text().count("KIND_CPU") == 1
    assert "KIND_AUTO" in (half / "unet" / "config.pbtxt").read_text()
    audio = []
    with EmbeddedServer(half) as server:
        for url in (triton.grpc_url, server.grpc_url):
            with AudioLDM2Client(url) as client:
                audio.append(client.generate("a dog", audio_length_in_s=0.64, num_inference_steps=4, seed=1).audio)
    assert np.isfinite(audio[1]).all()
    assert 1e-6 < relative_error(audio[1], audio[0]) < 5e-2
