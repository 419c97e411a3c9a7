"""The package as others see it: its wheel, its types, its weight, and what it needs."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import audioldm2_client
import pytest

from tests.helpers.document_examples import ROOT

USAGE = Path(__file__).with_name("typed_usage.py")
HEAVY = (
    "grpc",
    "httpx",
    "google.protobuf",
    "soundfile",
    "tqdm",
    "rich",
    "PIL",
    "torch",
    "gradio",
    "fastapi",
    "opentelemetry",
)
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
        "import sys\nfrom audioldm2_client._cli.main import main\n"
        f"try: main([{option!r}])\nexcept SystemExit: print(sorted(set({HEAVY[:3]!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("[]\n")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client's wheel, built as `pip wheel ./client` builds it, but by the hatchling that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT / "client", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="session")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(files.read(name).decode())


def test_wheel_holds_every_file_of_the_package_and_the_licence(wheel):
    source = ROOT / "client/src"
    package = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as files:
        names = files.namelist()
        (licence,) = [name for name in names if name.endswith("/LICENSE")]
        assert files.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert {name for name in names if ".dist-info/" not in name} == package


def test_wheel_describes_itself(metadata):
    project = tomllib.loads((ROOT / "client/pyproject.toml").read_text())["project"]
    assert metadata["Version"] == audioldm2_client.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Classifier") == project["classifiers"]
    assert len(metadata.get_all("Project-URL")) == len(project["urls"]) > 0
    assert "# audioldm2-client" in str(metadata.get_payload())


def test_wheel_needs_neither_torch_nor_anything_of_the_server(metadata):
    needed = {re.split(r"[^\w-]", line)[0] for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    assert "numpy" in needed
    assert not needed & {"torch", "diffusers", "transformers", "onnxruntime", "gradio", "nvidia-pytriton"}


def test_installed_wheel_works_without_torch(wheel, tmp_path):
    """In a fresh environment that sees the packages of this one, but for a torch that can't be imported."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True, timeout=60)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=60)
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    (site / "torch.py").write_text("raise ImportError('torch is not for clients')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    script = str(python.with_name("audioldm2"))
    assert run(script, "--version") == f"audioldm2 {audioldm2_client.__version__}\n"
    assert run(script, "--help").startswith("usage: audioldm2 ")
    assert run(script, "ui", "--help").startswith("usage: audioldm2 ui ")
    code = "import json, audioldm2_client as client; print(json.dumps([client.__file__, client.__all__]))"
    path, public = json.loads(run(str(python), "-W", "error", "-c", code))
    assert Path(path).is_relative_to(site)
    assert public == audioldm2_client.__all__
