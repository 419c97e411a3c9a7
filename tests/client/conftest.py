"""A real Triton server over a toy model repository, one for all tests of the client."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from audioldm2_client import AudioLDM2Client

from server import EmbeddedServer


@pytest.fixture(scope="session")
def toy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    repository = tmp_path_factory.mktemp("toy") / "model_repository"
    shutil.copytree(Path(__file__).parent / "toy_repository", repository)
    with EmbeddedServer(repository) as server:
        yield server


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, toy_server: EmbeddedServer) -> str:
    """The toy server's URL: every test that asks for it runs over both protocols."""
    return f"grpc://{toy_server.grpc_url}" if request.param == "grpc" else f"http://{toy_server.http_url}"


@pytest.fixture
def client(url: str) -> Iterator[AudioLDM2Client]:
    with AudioLDM2Client(url, timeout_s=20) as client:
        yield client


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[Path]:
    """A file that exists while the toy model waits, after the prompt `wait PATH`; removing it ends the wait."""
    path = tmp_path / "waiting"
    yield path
    path.unlink(missing_ok=True)
