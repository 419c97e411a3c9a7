"""A generation in a thread of its own, and its handle."""

import concurrent.futures
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from audioldm2_client._cancel_token import CallCancelledError, CancelToken
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
from audioldm2_client._transport import Transport
from audioldm2_client._url import ServerAddress

T = TypeVar("T")


class Transports(Protocol):
    """Give the transport for an address; the client owns them."""

    def __call__(self, address: ServerAddress) -> Transport:
        """Return the one transport for the address."""


def drive(
    flow: Flow[T],
    transports: Transports,
    token: CancelToken | None = None,
    on_address: Callable[[ServerAddress], object] = lambda _: None,
) -> T:
    """Do the steps of a flow, blocking, and return its result.

    Args:
        flow: see `_flow`.
        transports: for its I/O.
        token: cancels it from another thread.
        on_address: called with each address before something is sent there.

    Raises:
        AudioLDM2Error: the flow's own errors.
        CallCancelledError: the token was cancelled between two calls.
    """
    token = token or CancelToken()

    def perform(step: Step) -> Any:
        if isinstance(step, Sleep):
            return token.sleep(step.seconds)
        if isinstance(step, AskReady):
            return transports(step.address).is_ready(step.model_name, step.timeout_s)
        transport = transports(step.address)
        token.begin_attempt(lambda: on_address(step.address))
        return transport.infer(step.request, token)

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
    """A running generation; made by `AudioLDM2Client.submit`. Safe to use from several threads.

    Attributes:
        id: the request's id, for the server's log. It is all that is needed to watch and cancel the generation.
    """

    def __init__(self, request: InferenceRequest, transports: Transports, route: Route, max_retries: int) -> None:
        self.id = request.id
        self._request = request
        self._transports = transports
        self._address: ServerAddress | None = None
        self._token = CancelToken()
        self._future: concurrent.futures.Future[GenerationResult] = concurrent.futures.Future()
        flow = infer_flow(request, route, max_retries, time.monotonic)
        threading.Thread(target=self._run, args=(flow,), name=f"audioldm2-{self.id[:8]}", daemon=True).start()

    def done(self) -> bool:
        """Return whether it has ended, by a result or an error: `result` won't wait."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> GenerationResult:
        """Wait for the result. The generation continues if this ends early, by `timeout_s` or by Ctrl-C.

        Args:
            timeout_s: time to wait for it here, seconds; None waits for as long as the generation may take.

        Raises:
            TimeoutError: not over after `timeout_s`.
            AudioLDM2Error: the generation failed, see `AudioLDM2Client.generate`; RequestCancelledError after `cancel`.
        """
        if not concurrent.futures.wait([self._future], timeout_s).done:
            raise TimeoutError(f"generation {self.id} isn't over after {timeout_s} s")
        return self._future.result()

    def progress(self) -> Progress:
        """Ask the server how far the generation is.

        Raises:
            ModelNotFoundError: the server has no model `jobs`, and so can't tell.
            AudioLDM2Error: the server couldn't be asked.
        """
        return self._ask(JOBS_TIMEOUT_S)

    def cancel(self) -> bool:
        """End the generation here and on the server; `result` then raises RequestCancelledError.

        A generation that is over isn't changed. This takes milliseconds; up to 2 s where the server doesn't answer.

        Returns:
            Whether the server was told. False where the generation is over, or where the server can't be reached or has
            no model `jobs` and may continue it.
        """
        self._token.refuse_attempts()  # from here on, all that was sent is at the address that is noted
        try:
            flow = cancel_flow(self._request, lambda: self._address, self._future.done, time.monotonic)
            return drive(flow, self._transports)
        finally:
            self._token.cancel()
            concurrent.futures.wait([self._future])

    def watch(self, callback: ProgressCallback | None) -> None:
        """Call the callback with each change until the generation is over, or the server can't tell its progress.

        The server is asked in another thread. Ctrl-C is raised in the main one, at any instruction: in the callback of
        an event loop or in a destructor it would be lost.
        """
        if callback is None:
            return
        changes: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
        token = CancelToken()
        self._future.add_done_callback(lambda _: token.cancel())
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            polling = executor.submit(self._poll, changes.put, token)
            try:
                while (progress := changes.get()) is not None:
                    callback(progress)
            finally:
                token.cancel()
            polling.result()

    def _poll(self, report: Callable[[Progress | None], object], token: CancelToken) -> None:
        """Report every change until cancelled, or until the server can't tell; then report None."""
        watch = ProgressWatch(report)
        try:
            while watch.wanted:
                token.sleep(POLL_INTERVAL_S)
                try:
                    progress = self._ask(WATCH_TIMEOUT_S, token)
                except AudioLDM2Error as error:
                    watch.note_failure(error)
                else:
                    watch.report(progress)
        except CallCancelledError:
            pass
        finally:
            report(None)

    def _ask(self, timeout_s: float, token: CancelToken | None = None) -> Progress:
        return drive(jobs_flow(self._request, self._address, "status", timeout_s), self._transports, token)

    def _run(self, flow: Flow[Any]) -> None:
        failure: BaseException | None = None
        try:
            result = parse_response(drive(flow, self._transports, self._token, self._note_address), self._request)
        except CallCancelledError:
            failure = cancelled_here_error(self._request)
        except RequestCancelledError as error:  # `cancel` was faster on the server than here
            failure = cancelled_here_error(self._request) if self._token.refuses_attempts else error
        except BaseException as error:
            failure = error
        # Last, because the process may exit as soon as a caller has the result.
        if failure is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(failure)

    def _note_address(self, address: ServerAddress) -> None:
        self._address = address
