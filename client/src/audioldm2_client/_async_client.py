"""The asyncio client, the twin of `_client`."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Unpack

from audioldm2_client._async_call import AsyncCall, drive_async
from audioldm2_client._async_generation import AsyncGeneration
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
from audioldm2_client._signals import ENDING_SIGNALS, close_on_signals_async
from audioldm2_client._tracing import read_parent
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
        self._calls: set[AsyncCall] = set()  # event loops hold their tasks weakly
        self._closing: asyncio.Task[None] | None = None

    @lists_options
    async def generate(
        self,
        prompt: str | Sequence[str],
        *,
        request_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
        timeout_s: float | None = None,
        on_progress: ProgressCallback | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Generate audio for one prompt or several, and wait for it, as `AudioLDM2Client.generate` does.

        Cancelling the task, or any other exception in here, cancels the generation on the server too.

        Args:
            prompt: what to hear; one text, or P of them for P sounds (they share every other option).
            request_id: the request's id, 1 to 128 bytes of printable text; a random one. It stands in the server's log,
                and those who know it can watch and cancel the request: take one that can't be guessed.
            traceparent: the trace that this belongs to, as W3C defines it, and `tracestate` with it. What isn't valid
                is ignored. Without it, OpenTelemetry's current span is taken, if there is one.
            tracestate: see `traceparent`.
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
        generation = self.submit(
            prompt,
            request_id=request_id,
            traceparent=traceparent,
            tracestate=tracestate,
            timeout_s=timeout_s,
            **options,
        )
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
        request_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
        timeout_s: float | None = None,
        **options: Unpack[GenerationOptions],
    ) -> AsyncGeneration:
        """Start a generation in a task of its own, and return its handle at once; not to be awaited.

        Keep the handle: a generation whose handle is gone before the end is cancelled.

        Args:
            prompt: as in `generate`.
            request_id: as in `generate`.
            traceparent: as in `generate`.
            tracestate: as in `generate`.
            timeout_s: time allowed for this generation from now on, seconds; the client's `timeout_s`.
            **options: see `GenerationOptions`.

        Raises:
            InvalidRequestError: a value can't be sent at all. What the server refuses comes out of the handle.
            TypeError: a value of the wrong type, or an unknown option.
            RuntimeError: the client is closed, or no event loop runs.
        """
        request = self._prepare(prompt, timeout_s, request_id, options)
        parent = read_parent(traceparent, tracestate)
        call = AsyncCall(
            request, self._transport_for, self._route, self.max_retries, tell=self._tell_to_stop, parent=parent
        )
        self._calls.add(call)
        call.task.add_done_callback(lambda _: self._calls.discard(call))
        return AsyncGeneration(call)

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

    async def cancel_all(self) -> int:
        """Cancel everything that this client runs, here and on the servers; those who wait get RequestCancelledError.

        The client stays usable. This takes milliseconds; up to 2 s where a server doesn't answer.

        Returns:
            How many generations were cancelled.
        """
        running = list(self._calls)
        await asyncio.gather(*(call.cancel() for call in running))
        return len(running)

    def close_on_signals(
        self, signals: Sequence[signal.Signals] = ENDING_SIGNALS
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """Close this client when one of the signals arrives while the block runs: `async with`, in the main thread.

        As `AudioLDM2Client.close_on_signals`; where the signal would have ended the process without another word, the
        task of the block is cancelled, and SystemExit comes out of the block.

        Args:
            signals: SIGINT and SIGTERM. A program without a terminal may take SIGHUP for something else.

        Raises:
            ValueError: this isn't the main thread.
        """
        return close_on_signals_async(self.close, signals)

    async def close(self) -> None:
        """Cancel what still runs and free the connections.

        Closing again does nothing; `generate` and `submit` then raise RuntimeError.
        """
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.get_running_loop().create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        await self.cancel_all()
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
