"""The client's progress and cancelling, against the real models: what the client's own tests do with toy ones."""

import asyncio
import re
import sys

import pytest
from audioldm2_client import AsyncAudioLDM2Client, AudioLDM2Client, Progress, RequestCancelledError

from server import EmbeddedServer
from tests.helpers.job_calls import rows_are_free, wait_until_rows_are_free
from tests.helpers.terminal import Terminal
from tests.helpers.waiting import wait_until

SHORT_S = 0.64


@pytest.fixture(params=["grpc", "http"])
def url(request: pytest.FixtureRequest, triton: EmbeddedServer) -> str:
    return f"grpc://{triton.grpc_url}" if request.param == "grpc" else f"http://{triton.http_url}"


def test_progress_of_a_real_generation_rises_to_its_last_step(url):
    seen: list[Progress] = []
    with AudioLDM2Client(url) as client:
        client.generate("a dog", num_inference_steps=60, audio_length_in_s=SHORT_S, on_progress=seen.append)
    denoising = [progress for progress in seen if progress.state == "denoising"]
    assert len(denoising) >= 3
    assert {progress.total_steps for progress in denoising if progress.step} == {60}
    assert [progress.step for progress in denoising] == sorted(progress.step for progress in denoising)


def test_cancel_ends_a_real_generation(url):
    with AudioLDM2Client(url) as client:
        generation = client.submit("a dog", num_inference_steps=900, audio_length_in_s=SHORT_S)
        wait_until(lambda: generation.progress().step > 2, 60, "some steps")
        assert generation.cancel() is True
        with pytest.raises(RequestCancelledError):
            generation.result()
        wait_until(lambda: generation.progress().state == "cancelled", 20, "the server has stopped it")


def test_cancelling_a_task_ends_a_real_generation(url):
    async def test() -> None:
        async with AsyncAudioLDM2Client(url) as client:
            generation = client.submit("a dog", num_inference_steps=900, audio_length_in_s=SHORT_S)
            while (await generation.progress()).step < 3:
                await asyncio.sleep(0.02)
            assert await generation.cancel() is True
            while (await generation.progress()).state != "cancelled":
                await asyncio.sleep(0.02)

    asyncio.run(asyncio.wait_for(test(), 120))


def test_ctrl_c_ends_a_real_generation(url, triton, tmp_path):
    terminal = Terminal(
        *(sys.executable, "-m", "audioldm2_client", "a dog", "-o", str(tmp_path / "x.wav"), "--url", url),
        *("--steps", "900", "--length", str(SHORT_S)),
    )
    terminal.read_until("/900 steps", 60)
    assert not rows_are_free(triton)
    terminal.press_ctrl_c()
    assert terminal.wait() == 130
    wait_until_rows_are_free(triton)
    assert re.search(r"audioldm2: interrupted\s*$", terminal.text)
    assert not list(tmp_path.iterdir())
