"""Many generations at the same time, which survive restarts of the server."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

from audioldm2_client._async_client import AsyncAudioLDM2Client
from audioldm2_client._cli.prompts_file import PromptItem
from audioldm2_client._exceptions import (
    AudioLDM2Error,
    ModelNotFoundError,
    RequestCancelledError,
    ServerBusyError,
    ServerUnreachableError,
)
from audioldm2_client._flow import backoff_s
from audioldm2_client._result import GenerationResult

OnResult = Callable[[PromptItem, GenerationResult, float], object]
OnFailure = Callable[[PromptItem, AudioLDM2Error], object]


class ServerGoneError(Exception):
    """The server was busy or unreachable for longer than allowed; the cause is the last error."""


def may_pass(error: AudioLDM2Error) -> bool:
    """Return whether a server that is busy, stopping, unreachable or starting caused an error, and not the request.

    A generation whose connection was lost may have been completed; it is run again, and only the second result is kept.
    """
    words = str(error)
    if isinstance(error, (ServerBusyError, ServerUnreachableError)):
        return not error.misconfigured
    if isinstance(error, ModelNotFoundError):
        return "no available versions" in words  # it is loading, or being unloaded
    # A server that stops cancels its requests; where a client cancelled one, the message has this tag.
    return isinstance(error, RequestCancelledError) and not words.startswith("[CANCELLED]")


class Outage:
    """Measure how long the server hasn't answered, over all requests together."""

    def __init__(self, allowed_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed_s = allowed_s
        self._clock = clock
        self._since: float | None = None

    def answered(self) -> None:
        """Note that the server has answered."""
        self._since = None

    def is_too_long(self) -> bool:
        """Note that a request failed for a reason that may pass; return whether the outage is too long."""
        if self._since is None:
            self._since = self._clock()
        return self.left_s() <= 0

    def left_s(self) -> float:
        """Return for how long the server may still be away, seconds."""
        return self._allowed_s - (0.0 if self._since is None else self._clock() - self._since)


async def run_batch(
    client: AsyncAudioLDM2Client,
    items: Sequence[PromptItem],
    *,
    concurrency: int,
    retry_for_s: float,
    on_result: OnResult,
    on_failure: OnFailure,
) -> None:
    """Generate every item.

    Args:
        client: without retries of its own.
        items: what to generate.
        concurrency: requests at the same time.
        retry_for_s: how long the server may not answer at all, seconds.
        on_result: called with each result and the seconds that it took.
        on_failure: called with each item that failed for good; the others continue.

    Raises:
        ServerGoneError: the outage was too long. What still runs is cancelled, as after any other exception.
    """
    outage = Outage(retry_for_s)
    waiting = iter(items)
    workers = [
        asyncio.create_task(_work(client, waiting, outage, on_result, on_failure))
        for _ in range(min(concurrency, len(items)))
    ]
    try:
        await asyncio.gather(*workers)
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


async def _work(
    client: AsyncAudioLDM2Client,
    waiting: Iterator[PromptItem],
    outage: Outage,
    on_result: OnResult,
    on_failure: OnFailure,
) -> None:
    for item in waiting:
        start = time.monotonic()
        try:
            result = await _generate(client, item, outage)
        except AudioLDM2Error as error:
            on_failure(item, error)
        else:
            on_result(item, result, time.monotonic() - start)


async def _generate(client: AsyncAudioLDM2Client, item: PromptItem, outage: Outage) -> GenerationResult:
    failures = 0
    while True:
        try:
            result = await client.generate(item.prompt, request_id=item.request_id, **item.options)
        except AudioLDM2Error as error:
            if not may_pass(error):
                outage.answered()
                raise
            failures += 1
            if outage.is_too_long():
                raise ServerGoneError from error
            await asyncio.sleep(min(max(backoff_s(failures), error.retry_after_s or 0.0), outage.left_s()))
        else:
            outage.answered()
            return result
