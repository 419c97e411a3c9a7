"""A generation in a task of its own, and its handle. The asyncio twin of `_generation`."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from audioldm2_client._async_transport import AsyncTransport
from audioldm2_client._errors import cancelled_here_error
from audioldm2_client._exceptions import AudioLDM2Error, RequestCancelledError
from audioldm2_client._flow import AskReady, Flow, Route, Sleep, Step, cancel_flow, infer_flow, jobs_flow
from audioldm2_client._jobs import (
    JOBS_TIMEOUT_S,
    POLL_INTERVAL_S,
    WATCH_TIMEOUT_S,
    Progress,
    ProgressCallback,
    ProgressWatch,
)
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GenerationResult, parse_response
from audioldm2_client._url import ServerAddress

T = TypeVar("T")


class AsyncTransports(Protocol):
    """Give the transport for an address; the client owns them."""

    def __call__(self, address: ServerAddress) -> AsyncTransport:
        """Return the one transport for the address."""


async def drive_async(
    flow: Flow[T],
    transports: AsyncTransports,
    on_address: Callable[[ServerAddress], object] = lambda _: None,
) -> T:
    """Do the steps of a flow and return its result, as `_generation.drive`. Cancelling the task ends it.

    Raises:
        AudioLDM2Error: the flow's own errors.
    """

    async def perform(step: Step) -> Any:
        if isinstance(step, Sleep):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, AskReady):
            return await transports(step.address).is_ready(step.model_name, step.timeout_s)
        on_address(step.address)
        return await transports(step.address).infer(step.request)

    try:
        step = next(flow)
        while True:
            try:
                outcome = await perform(step)
            except AudioLDM2Error as error:
                step = flow.throw(error)
            else:
                step = flow.send(outcome)
    except StopIteration as end:
        result: T = end.value
        return result


class AsyncGeneration:
    """A running generation; made by `AsyncAudioLDM2Client.submit`.

    Attributes:
        id: the request's id, for the server's log. It is all that is needed to watch and cancel the generation.
    """

    def __init__(self, request: InferenceRequest, transports: AsyncTransports, route: Route, max_retries: int) -> None:
        self.id = request.id
        self._request = request
        self._transports = transports
        self._address: ServerAddress | None = None
        self._refuses_attempts = False
        self._task = asyncio.get_running_loop().create_task(
            self._run(infer_flow(request, route, max_retries, time.monotonic))
        )
        # A failure that is never asked for must not be logged as "never retrieved".
        self._task.add_done_callback(lambda task: task.cancelled() or task.exception())

    def done(self) -> bool:
        """Return whether it has ended, by a result or an error: `result` won't wait."""
        return self._task.done()

    async def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the result. The generation continues if this ends early, by `timeout_s` or by cancelling the task.

        Args:
            timeout_s: time to wait for it here, seconds; None waits for as long as the generation may take.

        Raises:
            TimeoutError: not over after `timeout_s`.
            AudioLDM2Error: it failed, see `AsyncAudioLDM2Client.generate`; RequestCancelledError after `cancel`.
        """
        if not (await asyncio.wait([self._task], timeout=timeout_s))[0]:
            raise TimeoutError(f"generation {self.id} isn't over after {timeout_s} s")
        if self._task.cancelled():
            raise cancelled_here_error(self._request)
        return self._task.result()

    async def progress(self) -> Progress:
        """Ask the server how far the generation is.

        Raises:
            ModelNotFoundError: the server has no model `jobs`, and so can't tell.
            AudioLDM2Error: the server couldn't be asked.
        """
        return await self._ask(JOBS_TIMEOUT_S)

    async def cancel(self) -> bool:
        """End the generation here and on the server; `result` then raises RequestCancelledError.

        A generation that is over isn't changed. This takes milliseconds; up to 2 s where the server doesn't answer.

        Returns:
            Whether the server was told. False where the generation is over, or where the server can't be reached or has
            no model `jobs` and may continue it.
        """
        self._refuses_attempts = True  # from here on, all that was sent is at the address that is noted
        try:
            flow = cancel_flow(self._request, lambda: self._address, self._task.done, time.monotonic)
            return await drive_async(flow, self._transports)
        finally:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def watch(self, callback: ProgressCallback | None) -> None:
        """Call the callback with each change until the generation is over, or the server can't tell its progress."""
        watch = ProgressWatch(callback)
        while watch.wanted and not (await asyncio.wait([self._task], timeout=POLL_INTERVAL_S))[0]:
            try:
                progress = await self._ask(WATCH_TIMEOUT_S)
            except AudioLDM2Error as error:
                watch.note_failure(error)
            else:
                watch.report(progress)

    async def _ask(self, timeout_s: float) -> Progress:
        return await drive_async(jobs_flow(self._request, self._address, "status", timeout_s), self._transports)

    async def _run(self, flow: Flow[Any]) -> GenerationResult:
        try:
            get_tensor = await drive_async(flow, self._transports, self._note_address)
        except RequestCancelledError as error:
            if self._refuses_attempts:  # `cancel` was faster on the server than here
                raise cancelled_here_error(self._request) from error
            raise
        return parse_response(get_tensor, self._request)

    def _note_address(self, address: ServerAddress) -> None:
        if self._refuses_attempts:
            raise asyncio.CancelledError
        self._address = address
