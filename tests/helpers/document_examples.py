"""Finds the examples in a document and runs them as they stand, but for the servers' addresses."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from server import EmbeddedServer

ROOT = Path(__file__).resolve().parents[2]
RUN_ELSEWHERE = ("make ", "pip install ")
"""Commands that install or start things; the demo has tests of its own."""


def blocks(document: str, language: str) -> list[str]:
    """The document's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)


def commands(block: str) -> list[str]:
    """The commands of a console block."""
    lines = [line.removeprefix("$ ") for line in block.splitlines() if line[:2] == "$ "]
    return [line for line in lines if not line.startswith(RUN_ELSEWHERE)]


def run_python(code: str, folder: Path, places: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a Python example in a folder."""
    return _run([sys.executable, "-W", "error", "-c", _moved(code, places)], folder, places)


def run_commands(lines: list[str], folder: Path, places: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run commands in a folder, until one of them fails."""
    script = "set -e\n" + _moved("\n".join(lines), places)
    script = script.replace(".venv/bin/", "").replace("curl ", "curl --fail --silent --show-error ")
    return _run(["bash", "-c", script], folder, places)


def places_of(server: EmbeddedServer) -> dict[str, str]:
    """Where the examples' servers are in reality."""
    return {"localhost:8001": server.grpc_url, "localhost:8000": server.http_url}


def _moved(text: str, places: Mapping[str, str]) -> str:
    for named, real in places.items():
        text = text.replace(named, real)
    return text


def _run(command: list[str], folder: Path, places: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "AUDIOLDM2_URL": places["localhost:8001"],
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
