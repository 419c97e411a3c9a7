"""Nobody waits any more: whatever way a caller has left, the server is told to stop."""

import asyncio
import gc
import subprocess
import sys
import time

import pytest
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client, DeadlineExceededError, RequestCancelledError
from audioldm2_client._call import Call
from audioldm2_client._flow import Route
from audioldm2_client._request import build_request
from audioldm2_client._url import parse_urls

from tests.helpers.waiting import taken_port, wait_until

LONG = 1000  # steps: far more than any test waits for


@pytest.fixture
def denoising(ask):
    """Waits until a request is denoised."""
    return lambda request_id: wait_until(lambda: ask(request_id).state == "denoising", 20, "denoising begins")


@pytest.fixture
def stopped(ask):
    """Waits until the server has stopped a request."""
    return lambda request_id: wait_until(lambda: ask(request_id).state == "cancelled", 20, "the server has stopped it")


async def until_denoising(ask, request_id: str) -> None:
    end = time.monotonic() + 20
    while ask(request_id).state != "denoising":
        assert time.monotonic() < end, "denoising begins"
        await asyncio.sleep(0.02)


def test_handle_that_is_dropped_cancels(url, denoising, stopped):
    with AudioLDM2Client(url) as client:
        generation = client.submit("a dog", num_inference_steps=LONG)
        request_id = generation.id
        denoising(request_id)
        del generation
        gc.collect()
        stopped(request_id)
        assert client.submit("a dog", num_inference_steps=2).result().audio.size  # held by the call of `result`


def test_handle_in_a_cycle_is_found_by_the_garbage_collector(url, denoising, stopped):
    with AudioLDM2Client(url) as client:
        generation = client.submit("a dog", num_inference_steps=LONG)
        request_id = generation.id
        denoising(request_id)
        generation.__dict__["itself"] = generation
        del generation
        gc.collect()
        stopped(request_id)


def test_exception_in_the_callers_own_code_cancels(url, denoising, stopped):
    handles = []

    def fail() -> None:
        with AudioLDM2Client(url) as client:
            handles.append(client.submit("a dog", num_inference_steps=LONG))
            denoising(handles[0].id)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(RequestCancelledError):
        handles[0].result()
    stopped(handles[0].id)


def test_deadline_that_passes_here_cancels(url, stopped, tmp_path):
    """The toy server has no clock of its own; a real one may be late with it, in a stage that can't look."""
    request_id = f"{tmp_path}"[-60:]
    with AudioLDM2Client(url) as client, pytest.raises(DeadlineExceededError):
        client.generate("a dog", num_inference_steps=LONG, request_id=request_id, timeout_s=1)
    stopped(request_id)


def test_deadline_that_passes_here_cancels_under_asyncio(url, stopped, tmp_path):
    request_id = f"{tmp_path}"[-60:]

    async def test() -> None:
        async with AsyncAudioLDM2Client(url) as client:
            await client.generate("a dog", num_inference_steps=LONG, request_id=request_id, timeout_s=1)

    with pytest.raises(DeadlineExceededError):
        asyncio.run(test())
    stopped(request_id)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_deadline_at_a_server_that_says_nothing_is_kept(scheme):
    """Telling it to stop takes 2 s there, and isn't waited for."""
    with taken_port() as port, AudioLDM2Client(f"{scheme}://127.0.0.1:{port}") as client:
        start = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            client.generate("a dog", timeout_s=0.3)
        assert time.monotonic() - start < 2


def test_dropped_handle_cancels_under_asyncio(url, ask, stopped):
    async def test() -> None:
        async with AsyncAudioLDM2Client(url) as client:
            generation = client.submit("a dog", num_inference_steps=LONG)
            request_id = generation.id
            await until_denoising(ask, request_id)
            del generation
            gc.collect()
            await asyncio.to_thread(stopped, request_id)

    asyncio.run(test())


def test_caller_who_is_cancelled_twice_has_cancelled_on_the_server(url, ask, stopped, tmp_path):
    """As by a task group that ends inside of a timeout: the second one comes while the server is told."""
    request_id = f"{tmp_path}"[-60:]

    async def test() -> None:
        async with AsyncAudioLDM2Client(url) as client:
            task = asyncio.create_task(client.generate("a dog", num_inference_steps=LONG, request_id=request_id))
            await until_denoising(ask, request_id)
            task.cancel()
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.to_thread(stopped, request_id)

    asyncio.run(test())


def test_cancel_all_cancels_everything_and_leaves_the_client_usable(url, denoising, stopped):
    with AudioLDM2Client(url) as client:
        generations = [client.submit("a dog", num_inference_steps=LONG) for _ in range(2)]
        for generation in generations:
            denoising(generation.id)
        assert client.cancel_all() == 2
        for generation in generations:
            with pytest.raises(RequestCancelledError, match="cancelled by this client"):
                generation.result(0)
            stopped(generation.id)
        assert client.cancel_all() == 0
        assert client.generate("a dog").audio.size


def test_cancel_all_under_asyncio(url, ask, stopped):
    async def test() -> list[str]:
        async with AsyncAudioLDM2Client(url) as client:
            generations = [client.submit("a dog", num_inference_steps=LONG) for _ in range(2)]
            for generation in generations:
                await until_denoising(ask, generation.id)
            assert await client.cancel_all() == 2
            assert (await client.generate("a dog")).audio.size
            return [generation.id for generation in generations]

    for request_id in asyncio.run(test()):
        stopped(request_id)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_many_are_cancelled_together_at_a_server_that_says_nothing(scheme):
    """Each takes up to 2 s there; one after the other it would be 24."""
    with taken_port() as port, AudioLDM2Client(f"{scheme}://127.0.0.1:{port}") as client:
        generations = [client.submit("a dog") for _ in range(12)]
        wait_until(lambda: all(generation._call.address for generation in generations), 20, "they are sent")
        start = time.monotonic()
        client.close()
        assert time.monotonic() - start < 8
        assert all(generation.done() for generation in generations)


def test_generation_that_a_signal_kept_from_beginning_ends_when_it_is_cancelled():
    """A signal's exception may come between any two instructions, also before the thread was started."""
    request = build_request("x", {}, model_name="audioldm2", request_id="r1", timeout_s=20)
    call = Call(request, lambda _: pytest.fail("nothing is sent"), Route(parse_urls("localhost:1")), 0)
    assert call.cancel() is False
    with pytest.raises(RequestCancelledError):
        call.future.result(0)


ENDS = {
    "the loop ends before the client is closed": """
    asyncio.run(start(AsyncAudioLDM2Client(sys.argv[1])))
    """,
    "the loop is closed over it": """
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # which would say that a task was destroyed
    loop.run_until_complete(start(client := AsyncAudioLDM2Client(sys.argv[1])))
    loop.close()
    """,
    "the loop ends while it is being cancelled": """
    async def main():
        await start(AsyncAudioLDM2Client(sys.argv[1]))
        handles.append(asyncio.create_task(handles[0].cancel()))
        await asyncio.sleep(0)
    asyncio.run(main())
    """,
    "Ctrl-C is pressed twice": """
    async def main():
        try:
            async with AsyncAudioLDM2Client(sys.argv[1]) as client:
                await start(client)
                os.kill(os.getpid(), signal.SIGINT)
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            os.kill(os.getpid(), signal.SIGINT)
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        pass
    """,
    "an exception leaves the program": """
    def program():
        client = AudioLDM2Client(sys.argv[1])
        generation = client.submit("a dog", num_inference_steps=1000, request_id=sys.argv[2])
        while generation.progress().state != "denoising":
            pass
        raise SystemExit(0)
    program()
    """,
}
STARTING = """
import asyncio, os, signal, sys
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client
handles = []
async def start(client):
    generation = client.submit("a dog", num_inference_steps=1000, request_id=sys.argv[2])
    handles.append(generation)
    while (await generation.progress()).state != "denoising":
        await asyncio.sleep(0.02)
if True:
"""


@pytest.mark.parametrize("end", ENDS)
def test_end_of_a_program_cancels_however_it_comes(url, stopped, tmp_path, end):
    request_id = f"{tmp_path}"[-60:]
    command = [sys.executable, "-c", STARTING + ENDS[end], url, request_id]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    stopped(request_id)
