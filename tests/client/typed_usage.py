"""The whole public interface in typed code: mypy checks it strictly, and a test runs it against a server."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Unpack

import numpy as np
import numpy.typing as npt
from audioldm2_client import (
    AccessDeniedError,
    AsyncAudioLDM2Client,
    AsyncGeneration,
    AudioLDM2Client,
    AudioLDM2Error,
    DeadlineExceededError,
    Generation,
    GenerationOptions,
    GenerationResult,
    InvalidRequestError,
    JobState,
    ModelNotFoundError,
    Progress,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
    TlsOptions,
)

ERRORS: tuple[type[AudioLDM2Error], ...] = (
    AccessDeniedError,
    DeadlineExceededError,
    InvalidRequestError,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerFaultError,
    ServerUnreachableError,
)


def on_progress(progress: Progress) -> None:
    state: JobState = progress.state
    numbers: tuple[int, int, int] = (progress.step, progress.total_steps, progress.requests_ahead)
    print(state, numbers)


def use_result(result: GenerationResult, folder: Path) -> None:
    audio: npt.NDArray[np.float32] = result.audio
    scores: npt.NDArray[np.float32] = result.clap_scores
    truncated: npt.NDArray[np.int32] = result.truncated_tokens
    seed: int = result.seed
    rate: int = result.sampling_rate
    prompts: tuple[str, ...] = result.prompts
    request_id: str = result.request_id
    path: Path = result.save(folder / f"{seed}.wav", index=0, subtype="FLOAT")
    print(audio.shape, scores, truncated, rate, prompts, request_id, path)


def use_error(error: AudioLDM2Error) -> None:
    words: str | None = error.server_message
    request_id: str | None = error.request_id
    safe: bool = error.safe_to_retry
    print(words, request_id, safe)


def short(client: AudioLDM2Client, prompt: str, **options: Unpack[GenerationOptions]) -> GenerationResult:
    """A wrapper that passes options on."""
    options.setdefault("audio_length_in_s", 0.64)
    return client.generate(prompt, **options)


def misuse(client: AudioLDM2Client, twin: AsyncAudioLDM2Client) -> None:
    """What type checkers refuse; never called. mypy --strict also reports comments that nothing needs."""
    client.generate("a dog", steps=4)  # type: ignore[call-arg]
    client.generate("a dog", seed="7")  # type: ignore[arg-type]
    client.submit("a dog", scheduler=["ddim"])  # type: ignore[arg-type]
    client.submit("a dog", on_progress=print)  # type: ignore[call-arg]
    twin.submit("a dog", num_inference_steps=4.5)  # type: ignore[arg-type]
    short(client, "a dog", guidance="3.5")  # type: ignore[call-arg]
    twin.generate("a dog", negative_prompt=3)  # type: ignore[arg-type, unused-coroutine]


def blocking(url: str, folder: Path) -> None:
    tls: TlsOptions | None = TlsOptions(ca_file="ca.pem", cert_file=None, key_file=None) if "s://" in url else None
    client = AudioLDM2Client(
        [url], model_name="audioldm2", timeout_s=60, max_retries=2, tls=tls, headers={"x-api-key": "none"}
    )
    with client, client.close_on_signals(signals=[signal.SIGTERM]):
        cancelled: int = client.cancel_all()
        print(cancelled)
        client.wait_until_ready(timeout_s=20)
        ready: bool = client.is_ready()
        print(ready, client.model_name, client.timeout_s, client.max_retries)
        result: GenerationResult = client.generate(
            ["a dog", "a cat"],
            negative_prompt=["low quality", "noise"],
            num_inference_steps=4,
            guidance_scale=3.5,
            guidance_start=0.2,
            guidance_end=0.8,
            audio_length_in_s=0.64,
            num_waveforms_per_prompt=2,
            seed=7,
            scheduler="ddim",
            eta=0.0,
            request_id="a dog and a cat",
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            tracestate="vendor=1",
            timeout_s=60,
            on_progress=on_progress,
        )
        use_result(result, folder)
        use_result(short(client, "a dog", num_inference_steps=4), folder)
        generation: Generation = client.submit("a dog", num_inference_steps=200, timeout_s=60)
        identity: str = generation.id
        progress: Progress = generation.progress()
        told: bool = generation.cancel()
        over: bool = generation.done()
        print(identity, progress, told, over)
        try:
            generation.result(timeout_s=1)
        except ERRORS as error:
            use_error(error)


async def with_asyncio(url: str, folder: Path) -> None:
    async with AsyncAudioLDM2Client(url, timeout_s=60) as client, client.close_on_signals():
        cancelled: int = await client.cancel_all()
        print(cancelled)
        await client.wait_until_ready(timeout_s=20)
        ready: bool = await client.is_ready()
        result: GenerationResult = await client.generate("a dog", num_inference_steps=4, on_progress=on_progress)
        use_result(result, folder)
        generation: AsyncGeneration = client.submit("a dog", num_inference_steps=4)
        progress: Progress = await generation.progress()
        use_result(await generation.result(timeout_s=60), folder)
        told: bool = await generation.cancel()
        print(ready, generation.id, progress, told, generation.done())


if __name__ == "__main__":
    blocking(sys.argv[1], Path(sys.argv[2]))
    asyncio.run(with_asyncio(sys.argv[1], Path(sys.argv[2])))
