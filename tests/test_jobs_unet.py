"""The job board over a real Triton with the model `unet` alone: direct calls, two instances, shared ids, trouble."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from google.protobuf import text_format
from job_board import JobBoard
from job_folder import SHARED_MEMORY, folder_of
from tritonclient.grpc.model_config_pb2 import ModelConfig

from server import EmbeddedServer
from tests.helpers import tiny_repository as tiny
from tests.helpers import waiting
from tests.helpers.job_calls import TIMEOUT_S, ask, wait_for, wait_for_state
from tests.helpers.tiny_unet import make_request, unet_inputs, write_unet_repository
from tests.helpers.unet_calls import UnetCaller

pytestmark = pytest.mark.server


class Caller(UnetCaller):
    """Calls the model `unet` with an id, and with a ticket if there is one."""

    def call(self, request_id: str, ticket: int | None = None, **request: Any) -> Any:
        inputs = unet_inputs(make_request(**request))
        if ticket is not None:
            inputs.append(tritonclient.grpc.InferInput("job_ticket", [1], "INT64"))
            inputs[-1].set_data_from_numpy(np.array([ticket], np.int64))
        return self._client.async_infer(
            "unet", inputs, lambda result, error: self.answers.put((result, error)), request_id=request_id
        )

    def next_error(self) -> str:
        _, error = self.next_answer()
        return error.message() if error else ""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Two instances of the model `unet`, with room for one guided request and 2 in the queue each."""
    repository = write_unet_repository(
        tmp_path_factory.mktemp("two") / "models", max_queue_size=2, max_rows=2, drain_timeout_s=1
    )
    path = repository / "unet" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    config.instance_group[0].count = 2
    path.write_text(text_format.MessageToString(config))
    with EmbeddedServer(repository) as server:
        yield server


@pytest.fixture
def caller(server: EmbeddedServer) -> Iterator[Caller]:
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        yield Caller(client)


def board_of(server: EmbeddedServer) -> JobBoard:
    warnings: list[str] = []
    board = JobBoard(folder_of("jobs", server.pid), warnings.append)
    assert warnings == []
    return board


def test_a_direct_call_is_watched_until_it_is_done(server, caller):
    caller.call("direct", steps=7)
    assert caller.next_error() == ""
    assert ask(server, "direct") == {"state": "done", "step": 7, "total_steps": 7, "requests_ahead": 0}


def test_two_instances_are_watched_and_cancelled_at_the_same_time(server, caller):
    for request_id in ("one", "two"):
        caller.call(request_id, steps=1000)
        wait_for_state(server, request_id, "denoising")
    both = [ask(server, request_id) for request_id in ("one", "two")]
    assert [said["state"] for said in both] == ["denoising"] * 2, "there is room for one request in each instance"
    for request_id, other in (("two", "one"), ("one", None)):
        ask(server, request_id, "cancel")
        assert caller.next_error().startswith("[CANCELLED] the request was cancelled after ")
        assert ask(server, request_id)["state"] == "cancelled"
        if other:
            assert ask(server, other)["state"] == "denoising", "only the one that was meant"


def test_an_id_that_comes_twice_belongs_to_the_later_request(server, caller):
    first = caller.call("twice", steps=1000)
    wait_for(server, "twice", lambda said: said["step"] > 0)
    caller.call("twice", steps=999)
    wait_for(server, "twice", lambda said: said["total_steps"] == 999 and said["step"] > 0)
    ask(server, "twice", "cancel")
    assert "of 999 steps" in caller.next_error()
    assert ask(server, "twice")["state"] == "cancelled"
    first.cancel()
    caller.next_error()
    assert ask(server, "twice")["total_steps"] == 999


def test_a_cancel_before_the_denoising_is_seen_at_its_door(server, caller):
    entry = board_of(server).create_entry("in text encoding")
    assert ask(server, "in text encoding", "cancel")["state"] == "queued"
    caller.call("in text encoding", ticket=entry.ticket, steps=1000)
    assert caller.next_error() == "[CANCELLED] the request was cancelled before there was room in the denoising loop."
    assert ask(server, "in text encoding")["state"] == "cancelled"
    entry.close()


def test_a_stage_without_a_ticket_of_its_own_touches_no_entry(server, caller):
    entry = board_of(server).create_entry("somebody else's")
    for ticket in (0, entry.ticket + 1, -1):
        caller.call("somebody else's", ticket=ticket, steps=2)
        assert caller.next_error() == ""
    assert ask(server, "somebody else's")["state"] == "queued"
    entry.end("failed")


def test_a_request_with_a_ticket_is_decoding_when_it_is_denoised(server, caller):
    entry = board_of(server).create_entry("staged")
    caller.call("staged", ticket=entry.ticket, steps=3)
    assert caller.next_error() == ""
    assert ask(server, "staged") == {"state": "decoding", "step": 3, "total_steps": 3, "requests_ahead": 0}
    entry.end("done")


def test_what_a_full_queue_refuses_has_failed(server, caller):
    running = [caller.call(f"full {number}", steps=1000) for number in range(16)]
    errors = [caller.next_error() for _ in range(10)]
    assert {error.split(" ")[0] for error in errors} == {"[UNAVAILABLE]"}
    states = [ask(server, f"full {number}")["state"] for number in range(16)]
    assert states.count("failed") >= 10, "more where they come faster than the loop takes them"
    assert states.count("denoising") + states.count("queued") == 16 - states.count("failed") > 0
    for call in running:
        call.cancel()
    for _ in range(6):
        caller.next_error()
    waiting.wait_until(
        lambda: all(ask(server, f"full {number}")["state"] in ("failed", "cancelled") for number in range(16)),
        TIMEOUT_S,
        "a cancelled call is seen",
    )


def test_requests_without_an_id_have_an_entry_that_nobody_can_ask_for(server, caller):
    board = board_of(server)
    before = {path.name for path in folder_of("jobs", server.pid).iterdir()}
    caller.call("", steps=2)
    assert caller.next_error() == ""
    [name] = {path.name for path in folder_of("jobs", server.pid).iterdir()} - before
    assert board.open_entry("", int(name, 16)).ticket == 0, "it is over"
    assert board.status(b"").state == board.status(name.encode()).state == "unknown"


def test_a_board_that_cannot_be_used_is_logged_once_and_requests_run(tmp_path):
    repository = write_unet_repository(tmp_path / "models")
    with EmbeddedServer(repository) as server, tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        folder_of("jobs", server.pid).chmod(0o755)
        caller = Caller(client)
        for _ in range(3):
            caller.call("unwatched", steps=2)
            assert caller.next_error() == ""
        assert ask(server, "unwatched")["state"] == "unknown"
        complaints = [line for line in server.log_text().splitlines() if "The job board at" in line]
        assert len(complaints) == 2, "one of `unet`, and one of `jobs`"
        assert "isn't this user's alone" in complaints[0]


def boards() -> set[Path]:
    return set(SHARED_MEMORY.glob("audioldm2_jobs_*"))


def test_the_board_is_gone_after_the_servers_end(tmp_path):
    repository = write_unet_repository(tmp_path / "models")
    with EmbeddedServer(repository) as server, tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        caller = Caller(client)
        caller.call("last", steps=2)
        assert caller.next_error() == ""
        folder = folder_of("jobs", server.pid)
        assert len(list(folder.iterdir())) == 1
        assert folder.stat().st_mode & 0o777 == 0o700
    assert folder not in boards()


RUNNER = """
import sys, time
from server import EmbeddedServer
with EmbeddedServer(sys.argv[1]) as server:
    print(server.pid, server.grpc_url, flush=True)
    time.sleep(600)
"""


def test_no_model_outlives_its_server_when_all_that_could_end_it_is_killed(tmp_path):
    repository = write_unet_repository(tmp_path / "models")
    tiny.add_double(repository)
    (tmp_path / "temporary").mkdir()
    runner = subprocess.Popen(
        [sys.executable, "-c", RUNNER, str(repository)],
        cwd=tiny.ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        stdout=subprocess.PIPE,
        text=True,
    )
    found: set[int] = set()
    try:
        pid, url = runner.stdout.readline().split()
        stubs = {child for child, line in tiny.processes_of(repository).items() if "python_backend_stub" in line}
        assert len(stubs) == 3, "unet, jobs and the ONNX model"
        found = {int(pid), *stubs, *tiny.processes_of(tmp_path / "temporary")} - {runner.pid}
        with tritonclient.grpc.InferenceServerClient(url) as client:
            caller = Caller(client)
            caller.call("while it is denoised", steps=1000)
            board = JobBoard(folder_of("jobs", int(pid)), pytest.fail)
            waiting.wait_until(
                lambda: board.status(b"while it is denoised").step > 0, TIMEOUT_S, "the request is denoised"
            )
            others = found - stubs
            for number in (runner.pid, *others):
                os.kill(number, signal.SIGKILL)
            waiting.wait_until(lambda: not stubs & set(tiny.processes_of(repository)), 5, "all models have ended")
            caller.next_error()
    finally:
        runner.kill()
        runner.communicate()
        for number in found & set(tiny.processes_of(tmp_path)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        for region in tiny.shared_memory_of(runner.pid):
            (SHARED_MEMORY / region).unlink(missing_ok=True)
        for path in boards():
            if f"_{pid}_" in path.name:
                shutil.rmtree(path, ignore_errors=True)
