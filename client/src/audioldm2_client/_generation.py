"""A generation that runs in a thread of its own, and what a caller can do with it."""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from audioldm2_client._drop import Drop, Dropped
from audioldm2_client._errors import cancelled_here_error
from audioldm2_client._exceptions import AudioLDM2Error
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
from audioldm2_client._transport import Transport
from audioldm2_client._url import ServerAddress

T = TypeVar("T")


class Transports(Protocol):
    """Where a transport for an address comes from; the client owns them."""

    def __call__(self, address: ServerAddress) -> Transport:
        """Return the one transport for the address."""


def drive(
    flow: Flow[T],
    transports: Transports,
    drop: Drop | None = None,
    on_address: Callable[[ServerAddress], object] = lambda _: None,
) -> T:
    """Do what a flow says, blocking, and return its result.

    Args:
        flow: see `_flow`.
        transports: for its I/O.
        drop: ends it from another thread.
        on_address: told every address before something is sent there.

    Raises:
        AudioLDM2Error: what the flow lets through.
        Dropped: `drop` was used before a call.
    """
    drop = drop or Drop()

    def perform(step: Step) -> Any:
        if isinstance(step, Sleep):
            return drop.sleep(step.seconds)
        if isinstance(step, AskReady):
            return transports(step.address).is_ready(step.model_name, step.timeout_s)
        transport = transports(step.address)
        drop.begin(lambda: on_address(step.address))
        return transport.infer(step.request, drop)

    try:
        step = next(flow)
        while True:
            try:
                outcome = perform(step)
            except AudioLDM2Error as error:
                step = flow.throw(error)
            else:
                step = flow.send(outcome)
    except StopIteration as end:
        result: T = end.value
        return result


class Generation:
    """One generation under way; made by `AudioLDM2Client.submit`. Safe to use from several threads.

    Attributes:
        id: the request's id, for the server's log. Whoever knows it can watch and cancel the generation.
    """

    def __init__(self, request: InferenceRequest, transports: Transports, route: Route, max_retries: int) -> None:
        self.id = request.id
        self._request = request
        self._transports = transports
        self._address: ServerAddress | None = None
        self._drop = Drop()
        self._future: concurrent.futures.Future[GenerationResult] = concurrent.futures.Future()
        flow = infer_flow(request, route, max_retries, time.monotonic)
        threading.Thread(target=self._run, args=(flow,), name=f"audioldm2-{self.id[:8]}", daemon=True).start()

    def done(self) -> bool:
        """Return whether it is over, well or not: `result` won't wait."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the result. The generation goes on where this ends early, by `timeout_s` or by Ctrl-C.

        Args:
            timeout_s: time to wait for it here, seconds; None waits for as long as the generation may take.

        Raises:
            TimeoutError: not over after `timeout_s`.
            AudioLDM2Error: it failed, as `AudioLDM2Client.generate` says; RequestCancelledError after `cancel`.
        """
        if not concurrent.futures.wait([self._future], timeout_s).done:
            raise TimeoutError(f"generation {self.id} isn't over after {timeout_s} s")
        return self._future.result()

    def progress(self) -> Progress:
        """Ask the server how far it is.

        Raises:
            ModelNotFoundError: the server has no jobs model, and so can't tell.
            AudioLDM2Error: it couldn't be asked.
        """
        return self._ask(JOBS_TIMEOUT_S)

    def cancel(self) -> bool:
        """End the generation here and on the server; `result` then raises RequestCancelledError.

        What is over stays as it is. This takes some milliseconds; up to 2 s where the server doesn't answer.

        Returns:
            Whether the server was told. False where the generation is over, the server can't be reached or has no jobs
            model: such a server may go on with it.
        """
        self._drop.forbid()  # from here on, what is sent is at the address that is noted
        try:
            flow = cancel_flow(self._request, lambda: self._address, self._future.done, time.monotonic)
            return drive(flow, self._transports)
        finally:
            self._drop.request()
            concurrent.futures.wait([self._future])

    def watch(self, callback: ProgressCallback | None) -> None:
        """Tell the callback about every change until the generation is over, or there is nothing to be told.

        The server is asked in another thread. Ctrl-C is raised in the main one, at any instruction: in the callback of
        an event loop or in a destructor it would be lost.
        """
        if callback is None:
            return
        news: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        drop = Drop()
        self._future.add_done_callback(lambda _: drop.request())
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            asking = executor.submit(self._keep_asking, news.put, drop)
            try:
                while (progress := news.get()) is not None:
                    callback(progress)
            finally:
                drop.request()
            asking.result()

    def _keep_asking(self, tell: Callable[[Progress | None], object], drop: Drop) -> None:
        """Tell every change until dropped, or until there is nothing to be told; then None."""
        watch = ProgressWatch(tell)
        try:
            while watch.wanted:
                drop.sleep(POLL_INTERVAL_S)
                try:
                    progress = self._ask(WATCH_TIMEOUT_S, drop)
                except AudioLDM2Error as error:
                    watch.failed(error)
                else:
                    watch.tell(progress)
        except Dropped:
            pass
        finally:
            tell(None)

    def _ask(self, timeout_s: float, drop: Drop | None = None) -> Progress:
        return drive(jobs_flow(self._request, self._address, "status", timeout_s), self._transports, drop)

    def _run(self, flow: Flow[Any]) -> None:
        failure: BaseException | None = None
        try:
            result = parse_response(drive(flow, self._transports, self._drop, self._note_address), self._request)
        except Dropped:
            failure = cancelled_here_error(self._request)
        except BaseException as error:
            failure = error
        # Last, because the process may end as soon as somebody has this.
        if failure is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(failure)

    def _note_address(self, address: ServerAddress) -> None:
        self._address = address
