"""The probe of containers says in a sentence what is wrong with a Triton, and with which stage."""

import itertools
import json
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

import pytest

from server import EmbeddedServer, probe
from server.stubs import Stub, find_stubs
from tests.helpers import tiny_repository as tiny
from tests.helpers import waiting
from tests.helpers.unkept_server import UnkeptServer

TIMEOUT_S = 5


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    repository = tmp_path_factory.mktemp("probe")
    tiny.add_double(repository)
    shutil.copytree(tiny.ROOT / "model_repository" / "jobs", repository / "jobs")
    steps = [("double", "x=x", "y=y")]
    tiny.add_chain(repository, "chain", tiny.tensors("TYPE_FP32 dims: [ -1, 3 ]", "TYPE_FP32 dims: [ -1, 3 ]"), steps)
    return repository


@pytest.fixture(scope="module")
def server(repository) -> EmbeddedServer:
    """One that no test harms, and beside which others run."""
    with UnkeptServer(repository, ready_timeout_s=60, stop_timeout_s=5) as server:
        yield server


@pytest.fixture
def victim(repository) -> EmbeddedServer:
    """One that may be harmed."""
    with UnkeptServer(repository, ready_timeout_s=60, stop_timeout_s=5) as server:
        yield server
        os.kill(server.pid, signal.SIGKILL)


def run(address: str, *arguments: str, **options) -> tuple[int, str]:
    """The command itself; returns its exit status and its one line."""
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "server.probe", "--http", address, *arguments],
        cwd=options.get("cwd", tiny.ROOT),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert time.monotonic() - start < TIMEOUT_S + 2
    output = done.stdout + done.stderr
    assert output.count("\n") == 1, output
    return done.returncode, output.rstrip("\n")


def pid_of(server: EmbeddedServer, model: str) -> int:
    return next(stub.pid for stub in find_stubs(server.pid) if stub.model == model)


@pytest.mark.server
@pytest.mark.parametrize("arguments", [[], ["--ready"]], ids=["live", "ready"])
def test_a_good_server_is_good(server, arguments):
    assert run(server.http_url, *arguments) == (0, "ok: 3 models are ready, and 2 processes of stages run")


@pytest.mark.server
def test_two_files_in_a_container_are_enough(server, tmp_path):
    (tmp_path / "server").mkdir()
    for name in ("probe.py", "stubs.py"):
        shutil.copy(tiny.ROOT / "server" / name, tmp_path / "server")
    assert run(server.http_url, cwd=tmp_path)[0] == 0


@pytest.mark.server
@pytest.mark.parametrize("model", ["double", "jobs"])
def test_a_dead_stage_is_told(server, victim, model):
    os.kill(pid_of(victim, model), signal.SIGKILL)
    assert run(victim.http_url) == (1, f"error: stage {model} died")
    assert run(server.http_url)[0] == 0, "another server on this machine is well"


@pytest.mark.server
def test_a_stopped_stage_is_told(victim):
    os.kill(pid_of(victim, "double"), signal.SIGSTOP)
    assert run(victim.http_url) == (1, "error: stage double has not run for a while (stopped)")


@pytest.mark.server
def test_a_server_that_does_not_answer_is_told_in_time(victim):
    os.kill(victim.pid, signal.SIGSTOP)
    start = time.monotonic()
    status, line = run(victim.http_url, "--timeout-s", "0.5")
    os.kill(victim.pid, signal.SIGCONT)
    assert (status, line) == (1, f"error: tritonserver at {victim.http_url} did not answer /v2/health/live in time")
    assert time.monotonic() - start < 3


def test_a_server_that_is_not_there_is_told():
    with waiting.taken_port() as port:
        pass
    status, line = run(f"127.0.0.1:{port}")
    assert status == 1
    assert line.startswith(f"error: tritonserver at 127.0.0.1:{port} does not answer /v2/health/live (")


@pytest.mark.parametrize("address", ["localhost:http", "127.0.0.1:99999", "no-such-host.invalid:1", "unix:/no/such"])
def test_an_address_that_cannot_be_is_told(address):
    status, line = run(address)
    assert status != 0
    assert address in line


class FakeTriton(BaseHTTPRequestHandler):
    """Answers as the test says, over a Unix socket; by default a model of its own process and an ensemble are ready."""

    answers: ClassVar[dict[str, tuple[int, bytes]]]

    def do_GET(self) -> None:
        status, body = self.answers.get(self.path, (200, b"{}"))
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815 - the library's name

    def log_message(self, *_: object) -> None:
        pass


INDEX = [
    {"name": "a", "version": "1", "state": "READY"},
    {"name": "b", "version": "1", "state": "READY"},
    {"name": "c"},
]


@pytest.fixture
def fake(tmp_path):
    """The address of a fake Triton."""
    FakeTriton.answers = {
        "/v2/repository/index": (200, json.dumps(INDEX).encode()),
        "/v2/models/a/config": (200, b'{"backend": "python"}'),
        "/v2/models/b/config": (200, b'{"backend": "", "ensemble_scheduling": {}}'),
        "/v2/models/c/ready": (400, b""),
    }
    path = tmp_path / "http.sock"
    with socketserver.UnixStreamServer(str(path), FakeTriton) as server:
        thread = threading.Thread(target=server.serve_forever, args=[0.05])
        thread.start()
        yield f"unix:{path}"
        server.shutdown()
        thread.join()


def stubs(monkeypatch: pytest.MonkeyPatch, *found: Stub) -> None:
    monkeypatch.setattr(probe, "find_servers", lambda: [1])
    monkeypatch.setattr(probe, "find_stubs", lambda _: list(found))


def test_a_unix_socket_will_do(fake, monkeypatch):
    stubs(monkeypatch, Stub(os.getpid(), "a"))
    switches = itertools.count()
    monkeypatch.setattr(probe, "switches_of_all_threads", lambda _: next(switches))
    assert probe.probe(fake, ready=True, timeout_s=5) == "2 models are ready, and 1 processes of stages run"


@pytest.mark.parametrize(
    ("path", "answer", "ready", "sentence"),
    [
        ("/v2/health/live", (400, b""), False, "tritonserver says that it is not live"),
        ("/v2/health/ready", (400, b""), True, "tritonserver says that it is not ready"),
        ("/v2/models/a/ready", (400, b""), False, "model a is not ready (its state is READY)"),
        (
            "/v2/repository/index",
            (200, b'[{"name": "a", "state": "UNAVAILABLE", "reason": "no room"}]'),
            False,
            "model a is not ready (no room)",
        ),
        ("/v2/repository/index", (403, b"no"), False, "tritonserver answers /v2/repository/index with status 403: no"),
        (
            "/v2/models/a/config",
            (200, b"{"),
            False,
            "tritonserver answers /v2/models/a/config with something else than",
        ),
    ],
)
def test_what_triton_says_is_told(fake, monkeypatch, path, answer, ready, sentence):
    stubs(monkeypatch)
    FakeTriton.answers[path] = answer
    with pytest.raises(probe.ProbeError) as error:
        probe.probe(fake, ready=ready, timeout_s=5)
    assert str(error.value).startswith(sentence)


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        ([], "stage a died"),
        ([Stub(1, "other")], "stage a died"),
        ([Stub(1, "")], "stage a died"),
        ([Stub(1, "a"), Stub(2, "")], "a stage died"),
    ],
)
def test_a_stage_without_a_living_process_died(fake, monkeypatch, found, sentence):
    stubs(monkeypatch, *found)
    with pytest.raises(probe.ProbeError, match=f"^{sentence}$"):
        probe.probe(fake, ready=False, timeout_s=5)


def test_a_container_without_a_tritonserver_is_told(fake, monkeypatch):
    monkeypatch.setattr(probe, "find_servers", list)
    with pytest.raises(probe.ProbeError, match="no process tritonserver that listens on unix:"):
        probe.probe(fake, ready=False, timeout_s=5)


def test_of_several_servers_that_which_listens_is_found(fake, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        monkeypatch.setattr(probe, "find_servers", lambda: [other.pid, os.getpid()])
        monkeypatch.setattr(probe, "find_stubs", lambda pid: [Stub(pid, "x")])
        with socket.create_server(("127.0.0.1", 0)) as listener:
            for address in (fake, f"localhost:{listener.getsockname()[1]}"):
                assert [stub.pid for stub in probe._stubs(address)] == [os.getpid()]
