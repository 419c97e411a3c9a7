"""`make` in a copy of the project whose path needs quoting: what was exported last is served."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from audioldm2_client import AudioLDM2Client

from export.demo import write_checkpoint

pytestmark = pytest.mark.server

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("export", "server", "model_repository")
TEXT = {"prompt": "a dog", "seed": 7, "num_inference_steps": 2, "audio_length_in_s": 0.64}
# The environment of this interpreter, and nothing installed into it.
MAKE = ("make", f"VENV={sys.prefix}", "ACCELERATOR=cpu", "-o", f"{sys.prefix}/.installed-cpu")
# Not the variables by which `make test`, which runs this, speaks to a make below it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
PORTS = ("HTTP_PORT=0", "GRPC_PORT=0", "METRICS_PORT=0")


@pytest.fixture(scope="module")
def project(tmp_path_factory, exported_repository) -> Path:
    """A copy in which the demo checkpoint of the tests was exported last."""
    if any(character.isspace() for character in sys.prefix):
        pytest.skip("make's VENV= can't have a space; the project's own .venv is a relative path")
    copy = tmp_path_factory.mktemp("a ü clone; $HOME") / 'it\'s "here"'
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "model.onnx*"))
    shutil.copy(ROOT / "Makefile", copy)
    shutil.copytree(exported_repository, copy / "model_repository", dirs_exist_ok=True)
    return copy


def start_make(project: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*MAKE, *arguments],
        cwd=project,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@contextmanager
def serving(project: Path, *arguments: str) -> Iterator[tuple[list[str], str]]:
    """`make serve` until the end of the block; gives what it said before it was ready, and the gRPC address."""
    process = start_make(project, "serve", *PORTS, *arguments)
    lines = []
    while not lines or not lines[-1].startswith("Ready: "):
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    try:
        yield lines[:-1], lines[-1].split("grpc://")[1].split()[0]
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        process.communicate(timeout=60)


def audio_of(address: str) -> bytes:
    with AudioLDM2Client(address) as client:
        return client.generate(**TEXT).audio.tobytes()


@pytest.mark.timeout(600)
def test_make_serves_what_was_exported_last_and_exports_only_what_is_named(project, triton, tmp_path):
    with serving(project) as (said, address):
        assert any("model_repository holds /" in line for line in said), said
        first = audio_of(address)
    assert first == audio_of(triton.grpc_url), "another checkpoint is served than the one exported last"

    other = tmp_path / "the other's $(weights)"
    write_checkpoint(other, seed=1)
    exported = start_make(project, "export", f"CHECKPOINT={other}")
    text = exported.communicate(timeout=300)[0]
    assert exported.returncode == 0, text
    assert f"exporting {other} in its place" in text

    again = start_make(project, "export", f"CHECKPOINT={other}")
    assert again.communicate(timeout=60)[0] == f"model_repository holds {other}.\n"
    with serving(project) as (said, address):
        assert any(line == f"model_repository holds {other}.\n" for line in said), said
        assert audio_of(address) != first


def test_make_demo_takes_every_character_of_a_prompt(project):
    output = project / "it's $5.wav"
    process = start_make(project, "demo", 'PROMPT=it\'s "raining" $5 $(cats)', f"OUTPUT={output}")
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 0, text
    assert output.stat().st_size > 44
