"""The package as others see it: its types, its weight, and what it needs."""

import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

USAGE = Path(__file__).with_name("typed_usage.py")
HEAVY = ("grpc", "httpx", "google.protobuf", "soundfile", "tqdm", "rich", "PIL", "torch", "gradio", "fastapi")
OF_TRITON = ("tritonclient", "gevent", "geventhttpclient", "aiohttp")


def test_typed_code_that_uses_the_whole_interface_passes_mypy_strict(tmp_path):
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}", str(USAGE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.stdout.startswith("Success"), done.stdout + done.stderr


def test_typed_code_that_uses_the_whole_interface_runs(url, tmp_path):
    command = [sys.executable, "-W", "error", str(USAGE), url, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_usage_names_everything_that_is_public():
    import audioldm2_client

    text = USAGE.read_text()
    assert [name for name in audioldm2_client.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_import_loads_nothing_heavy_and_is_quick():
    code = f"import sys, audioldm2_client; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    durations = []
    for _ in range(3):  # the best of them: others may be using the machine
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        durations.append(time.monotonic() - start)
        assert (done.stdout, done.stderr) == ("[]\n", "")
    assert min(durations) < 0.5


GENERATING = """
import asyncio, sys
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client
async def main():
    async with AsyncAudioLDM2Client(sys.argv[1]) as client:
        await client.generate("a dog")
with AudioLDM2Client(sys.argv[1]) as client:
    client.generate("a dog")
asyncio.run(main())
"""


def test_generating_needs_nothing_of_tritonclient(url):
    code = f"{GENERATING}print(sorted(set({OF_TRITON!r}) & set(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_lowest_versions_that_are_tested_are_those_that_are_allowed():
    root = Path(__file__).resolve().parents[2]
    allowed = tomllib.loads((root / "client" / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(re.match(r"([a-z]+)>=([\d.]+)", requirement).groups() for requirement in allowed)
    lines = (root / "requirements" / "client-lowest.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {name: version.removesuffix(".0") for name, version in tested.items()} == {
        name: version.removesuffix(".0") for name, version in lowest.items()
    }


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_command_answers_without_loading_what_it_does_not_need(option):
    code = (
        "import sys\nfrom audioldm2_client._cli import main\n"
        f"try: main([{option!r}])\nexcept SystemExit: print(sorted(set({HEAVY[:3]!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("[]\n")
