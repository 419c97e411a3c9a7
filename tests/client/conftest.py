"""A real Triton server over a toy model repository, one for all tests of the client, and one without the model `jobs`.

What the client does over the real models is in tests/test_client_jobs.py and in the tests of the page.
"""

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from audioldm2_client import AudioLDM2Client, Progress

from server import EmbeddedServer
from tests.helpers.tls_server import TlsProxy, guarding_arguments, make_certificates

TOY_REPOSITORY = Path(__file__).parent / "toy_repository"


@pytest.fixture(scope="session")
def toy_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(TOY_REPOSITORY, tmp_path_factory.mktemp("toy") / "model_repository")


@pytest.fixture(scope="session")
def toy_server(toy_repository: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(toy_repository, expose_internals=True) as server:
        yield server


@pytest.fixture(scope="session")
def toy_repository_without_jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("without_jobs") / "model_repository"
    return shutil.copytree(TOY_REPOSITORY, repository, ignore=shutil.ignore_patterns("jobs"))


@pytest.fixture(scope="session")
def server_without_jobs(toy_repository_without_jobs: Path) -> Iterator[EmbeddedServer]:
    with EmbeddedServer(toy_repository_without_jobs) as server:
        yield server


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, ca.*, and certificates of it for localhost, server.*, and for a client, client.*."""
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder)
    return folder


@pytest.fixture(scope="session")
def guarded_server(toy_repository_without_jobs: Path, certificates: Path) -> Iterator[EmbeddedServer]:
    """A server that wants a certificate over gRPC, and a key."""
    arguments = guarding_arguments(certificates)
    with EmbeddedServer(toy_repository_without_jobs, extra_arguments=arguments, front=False) as server:
        yield server


@pytest.fixture(scope="session")
def tls_proxy(guarded_server: EmbeddedServer, certificates: Path) -> Iterator[TlsProxy]:
    """TLS before the HTTP port of that server."""
    proxy = TlsProxy(guarded_server.http_url, certificates)
    yield proxy
    proxy.close()


@pytest.fixture(params=["grpc", "http"])
def protocol(request: pytest.FixtureRequest) -> str:
    return request.param


def url_of(server: EmbeddedServer, protocol: str) -> str:
    return f"grpc://{server.grpc_url}" if protocol == "grpc" else f"http://{server.http_url}"


@pytest.fixture
def url(protocol: str, toy_server: EmbeddedServer) -> str:
    """The toy server's URL: every test that asks for it runs over both protocols."""
    return url_of(toy_server, protocol)


@pytest.fixture
def url_without_jobs(protocol: str, server_without_jobs: EmbeddedServer) -> str:
    return url_of(server_without_jobs, protocol)


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


@pytest.fixture
def ask(toy_server: EmbeddedServer) -> Callable[[str], Progress]:
    """Asks the model `jobs` about a request, without this client or any other."""

    def progress_of(request_id: str) -> Progress:
        question = json.dumps({"request_id": request_id}).encode()
        with urllib.request.urlopen(f"http://{toy_server.http_url}/v2/models/jobs/generate", question, 20) as answer:
            found = json.load(answer)
        return Progress(*(found[name] for name in ("state", "step", "total_steps", "requests_ahead")))

    return progress_of
