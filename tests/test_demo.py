"""What `make demo` runs, over the exported demo checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[1]


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "server.demo", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_demo_writes_a_wav_file_of_the_asked_length(exported_repository, tmp_path):
    output = tmp_path / "new" / "dog.wav"
    done = run_demo("--model-repository", str(exported_repository), "--output", str(output), "a dog barking")
    assert done.returncode == 0, done.stderr
    assert f"{output}: 10.24 s at 16000 Hz" in done.stdout
    info = soundfile.info(output)
    assert (info.samplerate, info.channels, info.frames) == (16_000, 1, 163_840)


def test_demo_says_what_is_wrong_in_a_sentence(tmp_path):
    done = run_demo("--model-repository", str(tmp_path / "none"), "--output", str(tmp_path / "a.wav"), "a dog")
    assert done.returncode == 1
    assert done.stderr.startswith("demo: ")
    assert "Traceback" not in done.stderr
