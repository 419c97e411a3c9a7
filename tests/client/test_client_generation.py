"""Handles, progress and cancelling against a real server, over gRPC and HTTP."""

import asyncio
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest
from audioldm2_client import (
    AsyncGeneration,
    AudioLDM2Client,
    Generation,
    InvalidRequestError,
    ModelNotFoundError,
    Progress,
    RequestCancelledError,
    ServerUnreachableError,
)
from audioldm2_client._async_call import AsyncCall
from audioldm2_client._call import Call
from audioldm2_client._flow import Route
from audioldm2_client._request import build_request
from audioldm2_client._transport import GrpcTransport, HttpTransport
from audioldm2_client._url import parse_urls

from tests.helpers.waiting import wait_until

LONG = 1000  # steps: far more than any test waits for


@pytest.fixture
def stepping(url):
    with AudioLDM2Client(url, timeout_s=60) as client:
        yield client


def test_handle_comes_at_once_and_the_result_later(stepping):
    generation = stepping.submit("a dog", num_inference_steps=30, seed=7)
    assert not generation.done()
    with pytest.raises(TimeoutError, match=r"isn't over after 0\.01 s"):
        generation.result(0.01)
    result = generation.result()
    assert generation.done()
    assert result.seed == 7
    assert generation.result(0) is result


def test_failure_comes_out_of_the_handle(stepping):
    generation = stepping.submit("a dog", num_inference_steps=-1)
    with pytest.raises(InvalidRequestError, match="num_inference_steps") as caught:
        generation.result(30)
    assert caught.value.request_id == generation.id
    with pytest.raises(InvalidRequestError):
        stepping.submit([])
    with pytest.raises(TypeError):
        stepping.submit("a dog", seed="7")


def test_progress_rises_step_by_step(stepping):
    seen: list[Progress] = []
    result = stepping.generate("a dog", num_inference_steps=60, on_progress=seen.append)
    assert result.audio.size
    assert len(seen) == len(set(seen)) >= 3
    denoising = [progress for progress in seen if progress.state == "denoising"]
    assert {progress.total_steps for progress in denoising} == {60}
    steps = [progress.step for progress in denoising]
    assert len(steps) >= 3
    assert steps == sorted(steps)


def test_handle_tells_what_the_server_says(stepping, ask):
    generation = stepping.submit("a dog", num_inference_steps=LONG)
    wait_until(lambda: generation.progress().step > 2, 60, "some steps")
    before, told, after = ask(generation.id), generation.progress(), ask(generation.id)
    assert before.step <= told.step <= after.step
    assert (told.state, told.total_steps, told.requests_ahead) == ("denoising", after.total_steps, 0)
    assert generation.cancel() is True


def test_handle_tells_its_place_in_the_queue(url):
    """The toy server alone has a queue of known length: two are denoised at the same time."""
    with AudioLDM2Client(url) as client:
        generations = []
        for state in ("denoising", "denoising", "queued", "queued"):
            generations.append(client.submit("a dog", num_inference_steps=LONG))
            wait_until(lambda s=state: generations[-1].progress().state == s, 20, state)
        assert generations[2].progress() == Progress("queued", 0, 0, 0)
        assert generations[3].progress() == Progress("queued", 0, 0, 1)
        generations[0].cancel()
        wait_until(lambda: generations[2].progress().state == "denoising", 20, "the next one's turn")
        wait_until(lambda: generations[3].progress().requests_ahead == 0, 20, "moving up")


def test_cancel_ends_it_on_the_server_too(stepping, ask):
    generation = stepping.submit("a dog", num_inference_steps=LONG)
    wait_until(lambda: ask(generation.id).state == "denoising", 20, "denoising begins")
    assert generation.cancel() is True
    assert generation.done()
    with pytest.raises(RequestCancelledError, match="cancelled"):
        generation.result()
    wait_until(lambda: ask(generation.id).state == "cancelled", 20, "the server has stopped it")
    assert generation.cancel() is False


class FastServer:
    """A transport whose server ends a request before its `cancel` is answered."""

    def __init__(self) -> None:
        self.cancelled = threading.Event()
        self.ended = threading.Event()

    def infer(self, request, *_):
        if request.model_name == "jobs":
            self.cancelled.set()
            assert self.ended.wait(20)
            numbers = {name: np.zeros(1, np.int32) for name in ("step", "total_steps", "requests_ahead")}
            return {"state": np.array([b"cancelled"], np.object_), **numbers}.get
        assert self.cancelled.wait(20)
        self.ended.set()
        raise RequestCancelledError("[CANCELLED] The client gave up.")

    def release_thread(self) -> None: ...


class AsyncFastServer(FastServer):
    async def infer(self, request, *_):
        return await asyncio.to_thread(super().infer, request)


REQUEST = build_request("x", {}, model_name="audioldm2", request_id="r1", timeout_s=20)
ROUTE = Route(parse_urls("localhost:1"))


def test_cancelled_here_says_so_however_fast_the_server_is():
    server = FastServer()
    call = Call(REQUEST, lambda _: server, ROUTE, 0).start()
    generation = Generation(call)
    wait_until(lambda: call.address, 20, "it is sent")
    assert generation.cancel() is True
    with pytest.raises(RequestCancelledError, match="request r1 was cancelled by this client"):
        generation.result()


def test_cancelled_here_says_so_however_fast_the_server_is_under_asyncio():
    async def cancel_at_once() -> None:
        server = AsyncFastServer()
        generation = AsyncGeneration(AsyncCall(REQUEST, lambda _: server, ROUTE, 0))
        await asyncio.sleep(0)
        assert await generation.cancel() is True
        with pytest.raises(RequestCancelledError, match="request r1 was cancelled by this client"):
            await generation.result()

    asyncio.run(cancel_at_once())


def test_cancel_right_after_submit_leaves_nothing_on_the_server(stepping, ask):
    ids = []
    for _ in range(30):
        generation = stepping.submit("a dog", num_inference_steps=LONG)
        ids.append(generation.id)
        generation.cancel()
        with pytest.raises(RequestCancelledError):
            generation.result()
    stepping.generate("a cat", num_inference_steps=1)  # what was sent before has arrived before
    for request_id in ids:
        wait_until(lambda i=request_id: ask(i).state in ("cancelled", "unknown"), 5, "nothing goes on")


def test_cancel_of_what_is_done_changes_nothing(stepping):
    generation = stepping.submit("a dog", num_inference_steps=1)
    result = generation.result()
    assert generation.cancel() is False
    assert generation.result() is result


def test_exception_of_the_callback_comes_out_and_cancels(stepping, ask):
    class StopError(Exception):
        pass

    seen = []

    def stop(progress: Progress) -> None:
        if progress.state == "denoising":
            seen.append(progress)
            raise StopError("enough")

    ids = remember_ids(stepping)
    with pytest.raises(StopError, match="enough"):
        stepping.generate("a dog", num_inference_steps=LONG, on_progress=stop)
    assert len(seen) == 1
    wait_until(lambda: ask(ids[0]).state == "cancelled", 20, "the server has stopped it")


def remember_ids(client) -> list[str]:
    """The ids of all generations that the client starts from now on."""
    ids: list[str] = []
    submit = client.submit

    def remembering(*arguments, **options):
        generation = submit(*arguments, **options)
        ids.append(generation.id)
        return generation

    client.submit = remembering
    return ids


def test_leaving_the_client_cancels_what_still_runs(url, ask):
    with AudioLDM2Client(url) as client:
        generation = client.submit("a dog", num_inference_steps=LONG)
        wait_until(lambda: ask(generation.id).state == "denoising", 20, "denoising begins")
    with pytest.raises(RequestCancelledError):
        generation.result()
    wait_until(lambda: ask(generation.id).state == "cancelled", 20, "the server has stopped it")


SCRIPT = """
import sys, time
from audioldm2_client import AudioLDM2Client
client = AudioLDM2Client(sys.argv[1])
generation = client.submit("a dog", num_inference_steps=1000)
print(generation.id, flush=True)
while generation.progress().state == "unknown":
    time.sleep(0.01)
"""


def test_end_of_the_process_cancels_what_still_runs(url, ask):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    wait_until(lambda: ask(done.stdout.strip()).state == "cancelled", 20, "the server has stopped it")


FORKING = """
import os, sys
from audioldm2_client import AudioLDM2Client
with AudioLDM2Client(sys.argv[1]) as client:
    generation = client.submit("a dog", num_inference_steps=50)
    if (child := os.fork()) == 0:
        client.close()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    print(generation.result().seed)
"""


def test_end_of_a_forked_child_leaves_the_parents_generations_alone(toy_server):
    url = f"http://{toy_server.http_url}"  # gRPC doesn't support forks of its own
    done = subprocess.run([sys.executable, "-c", FORKING, url], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip().isdecimal()


def test_closed_client_says_so_also_through_its_handles(url):
    with AudioLDM2Client(url) as client:
        generation = client.submit("a dog")
        result = generation.result()
    assert generation.result() is result
    with pytest.raises(RuntimeError, match="client is closed"):
        generation.progress()


def test_generate_leaves_the_network_to_other_threads(stepping, monkeypatch):
    """In the caller's thread Ctrl-C could be raised, and lost, in a callback of the HTTP client's event loop."""
    asking = set()
    for transport in (GrpcTransport, HttpTransport):
        monkeypatch.setattr(transport, "infer", recording_threads(transport.infer, asking))
    seen: list[Progress] = []
    stepping.generate("a dog", num_inference_steps=60, on_progress=seen.append)
    assert seen
    assert len(asking) == 2  # one for the generation, one for its progress
    assert threading.current_thread() not in asking
    wait_until(lambda: not any(thread.is_alive() for thread in asking), 5, "the threads end")


def recording_threads(function, threads):
    def record(*arguments):
        threads.add(threading.current_thread())
        return function(*arguments)

    return record


INTERRUPTED = """
import sys
from audioldm2_client import AudioLDM2Client
client = AudioLDM2Client(sys.argv[1])
submit = client.submit
def announcing(*arguments, **options):
    generation = submit(*arguments, **options)
    print(generation.id, flush=True)
    return generation
client.submit = announcing
try:
    client.generate("a dog", num_inference_steps=1000, on_progress=eval(sys.argv[2]))
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.parametrize("on_progress", ["None", "print"])
def test_ctrl_c_in_generate_cancels_on_the_server(url, ask, on_progress):
    command = [sys.executable, "-W", "error", "-c", INTERRUPTED, url, on_progress]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            request_id = process.stdout.readline().strip()
            wait_until(lambda: ask(request_id).state == "denoising", 20, "denoising begins")
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert (process.returncode, err) == (0, "")
    assert out.endswith("interrupted\n")
    wait_until(lambda: ask(request_id).state == "cancelled", 20, "the server has stopped it")


def ask_until_told(generation) -> None:
    """Before the request is sent, no server is asked."""
    wait_until(lambda: generation.progress().state != "unknown", 20, "the server is asked")


def test_server_without_jobs_generates_and_says_that_it_cannot_tell(url_without_jobs):
    seen = []
    with AudioLDM2Client(url_without_jobs) as client:
        assert client.generate("a dog", num_inference_steps=30, on_progress=seen.append).audio.size
        assert seen == []
        generation = client.submit("a dog", num_inference_steps=30)
        with pytest.raises(ModelNotFoundError, match=r"can't tell progress, because its model 'jobs' isn't there"):
            ask_until_told(generation)
        assert generation.cancel() is False
        with pytest.raises(RequestCancelledError):
            generation.result(10)


def test_jobs_model_of_another_ensemble_is_asked_for_its_own_progress(url):
    with AudioLDM2Client(url, model_name="toy_generator") as client:
        generation = client.submit("a dog", num_inference_steps=20)
        with pytest.raises(ModelNotFoundError, match="'toy_generator_jobs'"):
            ask_until_told(generation)
        assert generation.cancel() is False


def test_readiness(url):
    with AudioLDM2Client(url) as client:
        client.wait_until_ready(20)
        assert client.is_ready() is True
    with AudioLDM2Client(url, model_name="nosuch") as client:
        assert client.is_ready() is False


@pytest.fixture
def dead_port():
    """A port without a listener: bound, so that no other process can take it."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_no_server_is_not_ready(protocol, dead_port):
    with AudioLDM2Client(f"{protocol}://127.0.0.1:{dead_port}") as client:
        assert client.is_ready() is False


def test_second_address_takes_over_from_a_dead_one(url, protocol, dead_port, ask):
    urls = [f"{protocol}://127.0.0.1:{dead_port}", url]
    with AudioLDM2Client(urls, max_retries=0) as client:
        assert client.is_ready() is True
        generation = client.submit("a dog", num_inference_steps=20)
        assert generation.result(30).audio.size
        assert ask(generation.id).state == "done"


def test_secrets_are_in_no_repr_and_no_message(protocol, dead_port):
    secret = "s3cret-key"  # noqa: S105 - made up
    client = AudioLDM2Client(
        f"{protocol}://127.0.0.1:{dead_port}", headers={"Authorization": f"Bearer {secret}"}, max_retries=0
    )
    with client, pytest.raises(ServerUnreachableError) as caught:
        client.generate("a dog")
    error: BaseException | None = caught.value
    while error is not None:
        assert secret not in f"{error!r} {error} {vars(error)}"
        error = error.__cause__ or error.__context__
    assert secret not in f"{client!r} {client._connection!r}"
