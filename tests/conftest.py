"""The demo checkpoint, its export, a real Triton server over it, and diffusers' own pipeline as the reference."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests use checkpoints made here
# Several processes with a thread for each core wait for work: not by spinning, which starves the others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime's pip package reports to its maker otherwise
# Under nohup and in the background of a script SIGINT is ignored, in all children too: no test could press Ctrl-C.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import tritonclient.grpc
from diffusers import AudioLDM2Pipeline

from export.checkpoint import Checkpoint
from export.demo import write_checkpoint
from export.repository import StageResult, export_checkpoint
from server import EmbeddedServer
from server import triton as triton_module


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-report", type=Path, metavar="FILE", help="write the measured errors there, as JSON")
    parser.addoption("--page-screenshot", type=Path, metavar="FILE", help="write a picture of the client's page there")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a server or a whole export through its fixtures, so that it can be left out or run apart."""
    for item in items:
        fixtures = getattr(item, "_fixtureinfo").name2fixturedefs  # noqa: B009 - pytest has no public name for it
        if "exported_repository" in fixtures or any(map(_gives_a_server, fixtures.values())):
            item.add_marker("server")


def _gives_a_server(definitions: Sequence[pytest.FixtureDef]) -> bool:
    return any("EmbeddedServer" in str(definition.func.__annotations__.get("return")) for definition in definitions)


@pytest.fixture(scope="session", autouse=True)
def _no_unmarked_server(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without the tests marked `server`, a test that starts one all the same fails."""
    with pytest.MonkeyPatch.context() as patch:
        if "not server" in request.config.option.markexpr:
            patch.setattr(triton_module, "SupervisedProcess", _refuse_to_start)
        yield


def _refuse_to_start(*_: object, **__: object) -> None:
    pytest.fail("this test starts a server: mark it with pytest.mark.server")


@pytest.fixture(scope="session")
def parity_errors(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], float]]:
    """Relative RMS error by group and case; written to `--parity-report` at the end."""
    errors: dict[tuple[str, str], float] = {}
    yield errors
    if path := request.config.getoption("--parity-report"):
        rows = [{"group": group, "case": case, "error": error} for (group, case), error in errors.items()]
        path.write_text(json.dumps(rows, indent=1) + "\n")


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as the hub lays it out: its language model is a GPT2Model."""
    folder = tmp_path_factory.mktemp("demo") / "checkpoint"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def lm_head_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under GPT2LMHeadModel, which diffusers can run."""
    folder = tmp_path_factory.mktemp("lm_head") / "checkpoint"
    write_checkpoint(folder, language_model="GPT2LMHeadModel")
    return folder


@pytest.fixture(scope="session")
def pipeline(lm_head_checkpoint: Path) -> AudioLDM2Pipeline:
    pipeline = AudioLDM2Pipeline.from_pretrained(lm_head_checkpoint, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def export_results() -> dict[str, StageResult]:
    """What `exported_repository` measured, by stage."""
    return {}


@pytest.fixture(scope="session")
def exported_repository(
    demo_checkpoint: Path, export_results: dict[str, StageResult], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A complete model repository of the demo checkpoint, in a folder of its own."""
    output = tmp_path_factory.mktemp("exported") / "model_repository"
    export_checkpoint(
        Checkpoint.find(str(demo_checkpoint)),
        output,
        on_start=[].append,
        on_done=export_results.__setitem__,
    )
    return output


@pytest.fixture(scope="session")
def triton(exported_repository: Path) -> Iterator[EmbeddedServer]:
    """A real server of the exported demo checkpoint, whose stages can be called, too."""
    with EmbeddedServer(exported_repository, expose_internals=True) as server:
        yield server


@pytest.fixture(scope="session")
def grpc_client(triton: EmbeddedServer) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    with tritonclient.grpc.InferenceServerClient(triton.grpc_url) as client:
        yield client
