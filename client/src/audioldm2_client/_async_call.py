"""A generation in a task of its own. The asyncio twin of `_call`."""

import asyncio
import atexit
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from audioldm2_client._abandoned import abandoned
from audioldm2_client._async_transport import AsyncTransport
from audioldm2_client._errors import cancelled_here_error
from audioldm2_client._exceptions import AudioLDM2Error, RequestCancelledError
from audioldm2_client._flow import (
    AskReady,
    Flow,
    Route,
    Sleep,
    Step,
    cancel_flow,
    infer_flow,
    jobs_flow,
    may_still_run,
)
from audioldm2_client._jobs import Progress
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GenerationResult, parse_response
from audioldm2_client._tracing import NO_PARENT, TraceParent, start_span
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


_running: "weakref.WeakSet[AsyncCall]" = weakref.WeakSet()


@atexit.register
def _abandon_all() -> None:
    """Have everything stopped whose event loop has ended without its task."""
    for call in list(_running):
        call.abandon_at_exit()


class AsyncCall:
    """A running generation. It belongs to one event loop; the arguments are those of `_call.Call`."""

    def __init__(
        self,
        request: InferenceRequest,
        transports: AsyncTransports,
        route: Route,
        max_retries: int,
        tell: Callable[[InferenceRequest, ServerAddress], object] = lambda *_: None,
        parent: TraceParent = NO_PARENT,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._span = start_span(request, parent)
        self.request = replace(request, headers=self._span.headers)
        self.address: ServerAddress | None = None
        self._transports = transports
        self._tell = tell
        self._process = os.getpid()
        self._ends_here = False
        self._cancelling: asyncio.Task[bool] | None = None
        abandoned.start()
        flow = infer_flow(self.request, route, max_retries, time.monotonic)
        self.task = self._loop.create_task(self._run(flow), context=self._span.context())
        _running.add(self)
        self.task.add_done_callback(self._note_end)

    def done(self) -> bool:
        """Return whether it is over."""
        return self.task.done()

    async def cancel(self) -> bool:
        """End it here and on the server; return whether the server was told. See `AsyncGeneration.cancel`.

        A caller that is cancelled itself while it waits here leaves the server being told.
        """
        if self.done():
            return False
        return await asyncio.shield(self._start_cancelling())

    def abandon(self) -> None:
        """Have it cancelled, because nobody can ask for its result any more. Waits for nothing, and takes no lock."""
        if self.done() or self._process != os.getpid():  # a forked child leaves its parent's alone
            return
        try:
            self._loop.call_soon_threadsafe(self._start_cancelling)
        except RuntimeError:  # the loop is closed, and the task will never run again
            self._leave_to_a_thread()

    def abandon_at_exit(self) -> None:
        """Have it cancelled by a thread, because its event loop won't do it any more."""
        if not self.done() and self._process == os.getpid():
            self._leave_to_a_thread()

    async def ask(self, timeout_s: float) -> Progress:
        """Ask the server how far it is."""
        return await drive_async(jobs_flow(self.request, self.address, "status", timeout_s), self._transports)

    def _note_end(self, task: "asyncio.Task[GenerationResult]") -> None:
        """Look at a failure, which would be logged as "never retrieved"; end the span of what never began."""
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._span.end(None, error)

    def _start_cancelling(self) -> "asyncio.Task[bool]":
        if self._cancelling is None or self._cancelling.done():
            self._cancelling = self._loop.create_task(self._cancel())
            self._cancelling.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._cancelling

    async def _cancel(self) -> bool:
        self._ends_here = True  # from here on, all that was sent is at the address that is noted
        try:
            flow = cancel_flow(self.request, lambda: self.address, self.done, time.monotonic)
            return await drive_async(flow, self._transports)
        except asyncio.CancelledError:  # the loop ends
            self._leave_to_a_thread()
            raise
        finally:
            self.task.cancel()
            await asyncio.wait([self.task])

    def _leave_to_a_thread(self) -> None:
        if self.address is not None:
            self._tell(self.request, self.address)

    async def _run(self, flow: Flow[Any]) -> GenerationResult:
        try:
            result = parse_response(await drive_async(flow, self._transports, self._note_address), self.request)
        except BaseException as error:
            if may_still_run(error) and not self._ends_here:
                self._leave_to_a_thread()
            if self._ends_here and isinstance(error, RequestCancelledError):  # faster on the server than here
                error = cancelled_here_error(self.request)
            self._span.end(None, error)
            raise error
        self._span.end(result, None)
        return result

    def _note_address(self, address: ServerAddress) -> None:
        if self._ends_here:
            raise asyncio.CancelledError
        self.address = address
