"""The asyncio client against a real server, over gRPC and HTTP."""

import asyncio
import gc
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest
from audioldm2_client import (
    AsyncAudioLDM2Client,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
    _network,
)

from tests.helpers.waiting import taken_port

LONG = 1000

Test = Callable[[AsyncAudioLDM2Client], Coroutine[Any, Any, None]]


@pytest.fixture
def run(url: str) -> Callable[..., None]:
    """Runs a coroutine function with a client."""

    def in_a_loop(test: Test, url: str = url, **settings: Any) -> None:
        async def with_client() -> None:
            async with AsyncAudioLDM2Client(url, **{"timeout_s": 30, **settings}) as client:
                await test(client)

        asyncio.run(with_client())
        gc.collect()  # what wasn't closed warns now

    return in_a_loop


async def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, f"not within 20 s: {what}"
        await asyncio.sleep(0.02)


def test_many_generations_at_once_get_their_own_results(run):
    async def test(client):
        results = await asyncio.gather(*(client.generate("a dog", audio_length_in_s=0.5, seed=i) for i in range(12)))
        assert [result.seed for result in results] == list(range(12))
        assert results[0].audio.shape == (1, 8000)
        assert results[0].audio.dtype == np.float32

    run(test)


def test_long_audio_arrives_whole(run):
    async def test(client):
        assert (await client.generate("long", audio_length_in_s=160.0)).audio.shape == (1, 2_560_000)

    run(test)


def test_handle_tells_progress_and_gives_the_result(run, ask):
    async def test(client):
        generation = client.submit("a dog", num_inference_steps=40, seed=7)
        assert not generation.done()
        with pytest.raises(TimeoutError):
            await generation.result(0.01)
        await until(lambda: ask(generation.id).state == "denoising", "denoising begins")
        progress = await generation.progress()
        assert (progress.state, progress.total_steps) == ("denoising", 40)
        assert (await generation.result()).seed == 7
        assert generation.done()
        assert await generation.cancel() is False

    run(test)


def test_progress_callback_sees_rising_steps(run):
    async def test(client):
        seen = []
        await client.generate("a dog", num_inference_steps=60, on_progress=seen.append)
        steps = [progress.step for progress in seen if progress.state == "denoising"]
        assert len(seen) == len(set(seen))
        assert len(steps) >= 3
        assert steps == sorted(steps)

    run(test)


def test_exception_of_the_callback_comes_out_and_cancels(run, ask):
    async def test(client):
        def stop(progress):
            if progress.state == "denoising":
                raise ZeroDivisionError

        ids = await ids_of(client)
        with pytest.raises(ZeroDivisionError):
            await client.generate("a dog", num_inference_steps=LONG, on_progress=stop)
        await until(lambda: ask(ids[0]).state == "cancelled", "the server has stopped it")

    run(test)


async def ids_of(client) -> list[str]:
    """The ids of all generations that the client starts from now on."""
    ids: list[str] = []
    submit = client.submit

    def remembering(*arguments, **options):
        generation = submit(*arguments, **options)
        ids.append(generation.id)
        return generation

    client.submit = remembering
    return ids


def test_cancel_ends_it_on_the_server_too(run, ask):
    async def test(client):
        generation = client.submit("a dog", num_inference_steps=LONG)
        await until(lambda: ask(generation.id).state == "denoising", "denoising begins")
        assert await generation.cancel() is True
        with pytest.raises(RequestCancelledError):
            await generation.result()
        await until(lambda: ask(generation.id).state == "cancelled", "the server has stopped it")

    run(test)


def test_cancelling_the_task_cancels_on_the_server(run, ask):
    async def test(client):
        ids = await ids_of(client)
        task = asyncio.create_task(client.generate("a dog", num_inference_steps=LONG))
        await until(lambda: bool(ids) and ask(ids[0]).state == "denoising", "denoising begins")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: ask(ids[0]).state == "cancelled", "the server has stopped it")

    run(test)


def test_timeout_of_asyncio_cancels_on_the_server(run, ask):
    async def test(client):
        ids = await ids_of(client)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await client.generate("a dog", num_inference_steps=LONG)
        await until(lambda: ask(ids[0]).state in ("cancelled", "unknown"), "nothing goes on")

    run(test)


def test_cancelling_who_waits_for_a_handle_leaves_the_generation_alone(run):
    async def test(client):
        generation = client.submit("a dog", num_inference_steps=20)
        waiting = asyncio.create_task(generation.result())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert (await generation.result()).audio.size

    run(test)


def test_leaving_the_client_cancels_what_still_runs(run, ask):
    handles = []

    async def test(client):
        handles.append(client.submit("a dog", num_inference_steps=LONG))
        await until(lambda: ask(handles[0].id).state == "denoising", "denoising begins")

    run(test)
    assert handles[0].done()
    assert ask(handles[0].id).state in ("denoising", "cancelled")  # told; it ends within a step


def test_server_without_jobs_generates_and_says_that_it_cannot_tell(run, url_without_jobs):
    async def test(client):
        seen = []
        assert (await client.generate("a dog", num_inference_steps=30, on_progress=seen.append)).audio.size
        assert seen == []
        generation = client.submit("a dog", num_inference_steps=30)
        await asyncio.sleep(0)  # it is sent
        with pytest.raises(ModelNotFoundError, match=r"can't tell progress, because its model 'jobs' isn't there"):
            await generation.progress()
        assert await generation.cancel() is False

    run(test, url_without_jobs)


@pytest.mark.parametrize(
    ("prompt", "error_class", "words"),
    [
        ("fail INVALID_ARG [INVALID_ARG] größer 犬", InvalidRequestError, "[INVALID_ARG] größer 犬"),
        ("fail UNAVAILABLE too many", ServerBusyError, "too many"),
        ("fail CANCELLED [DEADLINE] over", DeadlineExceededError, "[DEADLINE] over"),
        ("fail INTERNAL boom", ServerFaultError, "boom"),
    ],
)
def test_failure_has_its_class_and_the_servers_sentence(run, url, prompt, error_class, words):
    async def test(client):
        with pytest.raises(error_class) as caught:
            await client.generate(prompt)
        assert str(caught.value).endswith(words)

    run(test, url, max_retries=0)


def test_unknown_model_and_readiness(run, url):
    async def test(client):
        assert await client.is_ready() is True
        await client.wait_until_ready(20)

    async def other(client):
        assert await client.is_ready() is False
        with pytest.raises(ModelNotFoundError, match="'nosuch'"):
            await client.generate("a dog")

    run(test)
    run(other, url, model_name="nosuch")


def test_deadline_is_kept_and_told_to_the_server(run, url, waiting):
    async def test(client):
        start = time.monotonic()
        with pytest.raises(DeadlineExceededError, match=r"within 0\.3 s"):
            await client.generate(f"wait {waiting}", timeout_s=0.3)
        assert time.monotonic() - start < 5
        with pytest.raises(InvalidRequestError, match='"timeout_us": 12500000'):
            await client.generate("echo", timeout_s=12.5)

    run(test, url)


def test_dead_and_silent_servers(run, protocol, monkeypatch):
    monkeypatch.setattr(_network, "CONNECT_TIMEOUT_S", 0.5)

    async def dead(client):
        assert await client.is_ready() is False
        with pytest.raises(ServerUnreachableError) as caught:
            await client.generate("a dog")
        assert caught.value.safe_to_retry

    async def silent(client):
        with pytest.raises(DeadlineExceededError):
            await client.generate("a dog", timeout_s=0.3)

    run(dead, f"{protocol}://127.0.0.1:1", max_retries=0)
    with taken_port() as port:
        run(silent, f"{protocol}://127.0.0.1:{port}")


def test_connection_that_is_never_made_is_unreachable_long_before_the_deadline(run, protocol, monkeypatch):
    monkeypatch.setattr(_network, "CONNECT_TIMEOUT_S", 0.3)

    async def test(client):
        start = time.monotonic()
        with pytest.raises(ServerUnreachableError) as caught:
            await client.generate("x")
        assert time.monotonic() - start < 5
        assert caught.value.safe_to_retry

    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, socket.create_connection(full.getsockname()):
        run(test, f"{protocol}://127.0.0.1:{full.getsockname()[1]}", max_retries=0)


def test_closed_client_says_so(run):
    async def test(client):
        await client.close()
        await client.close()
        with pytest.raises(RuntimeError, match="client is closed"):
            await client.generate("x")

    run(test)


SCRIPT = """
import asyncio, sys
from audioldm2_client import AsyncAudioLDM2Client
async def main():
    async with AsyncAudioLDM2Client(sys.argv[1]) as client:
        print(len(await asyncio.gather(*(client.generate("a dog", seed=i) for i in range(4)))))
asyncio.run(main())
"""


def test_process_ends_without_a_word_on_stderr(url):
    command = [sys.executable, "-W", "error", "-c", SCRIPT, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")
