"""The asyncio client, the twin of `_client`."""

import asyncio
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Unpack

from audioldm2_client._async_generation import AsyncGeneration, drive_async
from audioldm2_client._async_transport import AsyncTransport, make_async_transport
from audioldm2_client._connection import TlsOptions
from audioldm2_client._core import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_READY_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    ClientCore,
)
from audioldm2_client._flow import ready_flow, wait_until_ready_flow
from audioldm2_client._jobs import DEFAULT_MODEL_NAME, JOBS_TIMEOUT_S, ProgressCallback
from audioldm2_client._options import GenerationOptions, lists_options
from audioldm2_client._request import check_timeout
from audioldm2_client._result import GenerationResult
from audioldm2_client._url import ServerAddress


class AsyncAudioLDM2Client(ClientCore):
    """Generate audio on a Triton server, for asyncio. It belongs to the event loop that it is first used in.

    Arguments and errors are those of `AudioLDM2Client`. Cancelling the task of `generate` cancels the generation on the
    server too.
    """

    def __init__(
        self,
        url: str | Sequence[str] = DEFAULT_URL,
        *,
        model_name: str = DEFAULT_MODEL_NAME,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_retries: int = DEFAULT_MAX_RETRIES,
        tls: TlsOptions | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(
            url, model_name=model_name, timeout_s=timeout_s, max_retries=max_retries, tls=tls, headers=headers
        )
        self._transports: dict[ServerAddress, AsyncTransport] = {}
        self._generations: weakref.WeakSet[AsyncGeneration] = weakref.WeakSet()

    @lists_options
    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Generate audio for one prompt or several, and wait for it, as `AudioLDM2Client.generate` does.

        Cancelling the task, or any other exception in here, cancels the generation on the server too.

        Args:
            prompt: what to hear; one text, or P of them for P sounds (they share every other option).
            timeout_s: time allowed for this generation, seconds; the client's `timeout_s`. The server is told it too.
            on_progress: a plain function, called in the event loop with each new `Progress`.
            **options: see `GenerationOptions`.

        Returns:
            P x W waveforms, W = num_waveforms_per_prompt.

        Raises:
            AudioLDM2Error: as `AudioLDM2Client.generate`.
            TypeError: a value of the wrong type, or an unknown option.
            RuntimeError: the client is closed.
        """
        generation = self.submit(prompt, timeout_s=timeout_s, **options)
        try:
            await generation.watch(on_progress)
            return await generation.result()
        except BaseException:
            if not generation.done():
                await generation.cancel()
            raise

    @lists_options
    def submit(
        self,
        prompt: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGeneration:
        """Start a generation in a task of its own, and return its handle at once; not to be awaited.

        Args:
            prompt: as in `generate`.
            timeout_s: time allowed for this generation from now on, seconds; the client's `timeout_s`.
            **options: see `GenerationOptions`.

        Raises:
            InvalidRequestError: a value can't be sent at all. What the server refuses comes out of the handle.
            TypeError: a value of the wrong type, or an unknown option.
            RuntimeError: the client is closed, or no event loop runs.
        """
        request = self._prepare(prompt, timeout_s, options)
        generation = AsyncGeneration(request, self._transport_for, self._route, self.max_retries)
        self._generations.add(generation)
        return generation

    async def is_ready(self) -> bool:
        """Return whether one of the servers says that the ensemble is ready; False where none answers.

        Raises:
            RuntimeError: the client is closed.
        """
        self._check_open()
        return await drive_async(ready_flow(self.model_name, self._route, JOBS_TIMEOUT_S), self._transport_for)

    async def wait_until_ready(self, timeout_s: float = DEFAULT_READY_TIMEOUT_S) -> None:
        """Wait until one of the servers says that the ensemble is ready.

        Args:
            timeout_s: time to wait, seconds, > 0; 60.

        Raises:
            DeadlineExceededError: none was in time.
            RuntimeError: the client is closed.
        """
        self._check_open()
        flow = wait_until_ready_flow(self.model_name, self._route, check_timeout(timeout_s), time.monotonic)
        await drive_async(flow, self._transport_for)

    async def close(self) -> None:
        """Cancel what still runs and free the connections.

        Closing again does nothing; `generate` and `submit` then raise RuntimeError.
        """
        if self._closed:
            return
        self._closed = True
        running = [generation for generation in self._generations if not generation.done()]
        await asyncio.gather(*(generation.cancel() for generation in running))
        for transport in self._transports.values():
            await transport.close()
        self._transports.clear()

    def _transport_for(self, address: ServerAddress) -> AsyncTransport:
        if address not in self._transports:
            self._check_open()
            self._transports[address] = make_async_transport(address, self._connection)
        return self._transports[address]

    async def __aenter__(self) -> "AsyncAudioLDM2Client":
        return self

    async def __aexit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()
