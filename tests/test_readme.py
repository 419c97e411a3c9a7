"""The examples in the READMEs, run as they stand against a real server (on other ports)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from server import EmbeddedServer

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "client/README.md")
RUN_ELSEWHERE = ("make ", "pip install ")
"""Commands that install or start things; the demo has tests of its own."""


def blocks(language: str) -> list[str]:
    return [
        block
        for readme in READMES
        for block in re.findall(rf"^```{language}\n(.*?)^```", (ROOT / readme).read_text(), re.DOTALL | re.MULTILINE)
    ]


def commands() -> list[str]:
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]
    return [line for line in lines if not line.startswith(RUN_ELSEWHERE)]


def moved(text: str, triton: EmbeddedServer) -> str:
    return text.replace("localhost:8001", triton.grpc_url).replace("localhost:8000", triton.http_url)


def run(command: list[str], triton: EmbeddedServer, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "AUDIOLDM2_URL": triton.grpc_url,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_example_runs(code, triton, tmp_path):
    done = run([sys.executable, "-W", "error", "-c", moved(code, triton)], triton, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dog.wav").stat().st_size > 44


@pytest.mark.parametrize("command", commands())
def test_command_example_runs(command, triton, tmp_path):
    line = moved(command, triton).replace(".venv/bin/", "").replace("curl ", "curl --fail --silent --show-error ")
    done = run(["bash", "-c", line], triton, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_there_are_examples_of_each_kind():
    assert len(blocks("python")) == 2
    assert {command.split()[0] for command in commands()} == {".venv/bin/audioldm2", "audioldm2", "curl"}
