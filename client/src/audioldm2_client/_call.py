"""A generation in a thread of its own. The client holds it while it runs, whatever becomes of its handle."""

import concurrent.futures
import contextlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from audioldm2_client._abandoned import abandoned
from audioldm2_client._cancel_token import CallCancelledError, CancelToken
from audioldm2_client._connection import ConnectionOptions
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
from audioldm2_client._transport import Transport, make_transport
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


def tell_to_stop(request: InferenceRequest, address: ServerAddress, options: ConnectionOptions) -> None:
    """Tell a server, over a connection of its own, that nobody waits for a request any more."""
    transport = make_transport(address, options)
    try:
        drive(cancel_flow(request, lambda: address, lambda: False, time.monotonic), lambda _: transport)
    finally:
        transport.close()


class Call:
    """A running generation. Safe to use from several threads.

    Args:
        request: what to send.
        transports: for its I/O.
        route: the servers.
        max_retries: see `infer_flow`.
        tell: has a server told to stop the request, without waiting for it.
        parent: the trace that the generation belongs to.
    """

    def __init__(
        self,
        request: InferenceRequest,
        transports: Transports,
        route: Route,
        max_retries: int,
        tell: Callable[[InferenceRequest, ServerAddress], object] = lambda *_: None,
        parent: TraceParent = NO_PARENT,
    ) -> None:
        self._span = start_span(request, parent)
        self.request = replace(request, headers=self._span.headers)
        self.future: concurrent.futures.Future[GenerationResult] = concurrent.futures.Future()
        self.address: ServerAddress | None = None
        self._transports = transports
        self._tell = tell
        self._process = os.getpid()
        self._token = CancelToken()
        self._flow = infer_flow(self.request, route, max_retries, time.monotonic)
        self._over = False
        run = self._span.context().run  # libraries that trace connections look for the current span
        name = f"audioldm2-{self.request.id[:8]}"
        self._thread = threading.Thread(target=run, args=(self._run,), name=name, daemon=True)

    def start(self) -> "Call":
        """Begin; return the call itself."""
        abandoned.start()
        try:
            self._thread.start()
        except RuntimeError as error:  # the system has no more threads
            self._end(None, error)
            raise
        return self

    def done(self) -> bool:
        """Return whether it is over."""
        return self._over

    def cancel(self) -> bool:
        """End it here and on the server; return whether the server was told. See `Generation.cancel`."""
        self._token.refuse_attempts()  # from here on, all that was sent is at the address that is noted
        if self._thread.ident is None:  # a signal has come before it began
            self._end(None, cancelled_here_error(self.request))
        try:
            flow = cancel_flow(self.request, lambda: self.address, self.done, time.monotonic)
            return drive(flow, self._transports)
        finally:
            self._token.cancel()
            concurrent.futures.wait([self.future])

    def abandon(self) -> None:
        """Have it cancelled, because nobody can ask for its result any more. Waits for nothing, and takes no lock."""
        if not self.done() and self._process == os.getpid():  # a forked child leaves its parent's alone
            abandoned.put(self.cancel)

    def ask(self, timeout_s: float, token: CancelToken | None = None) -> Progress:
        """Ask the server how far it is."""
        return drive(jobs_flow(self.request, self.address, "status", timeout_s), self._transports, token)

    def _run(self) -> None:
        try:
            get_tensor = drive(self._flow, self._transports, self._token, self._note_address)
            result = parse_response(get_tensor, self.request)
        except CallCancelledError:
            self._end(None, cancelled_here_error(self.request))
        except RequestCancelledError as error:  # `cancel` was faster on the server than here
            self._end(None, cancelled_here_error(self.request) if self._token.refuses_attempts else error)
        except BaseException as error:
            if may_still_run(error) and self.address is not None:
                self._tell(self.request, self.address)
            self._end(None, error)
        else:
            self._end(result, None)

    def _end(self, result: GenerationResult | None, error: BaseException | None) -> None:
        """Give it its end. Last of all, because the process may exit as soon as a caller has the result."""
        self._over = True
        self._span.end(result, error)
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is not None:
                self.future.set_exception(error)
            elif result is not None:
                self.future.set_result(result)

    def _note_address(self, address: ServerAddress) -> None:
        self.address = address
