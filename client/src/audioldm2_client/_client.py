"""The blocking client."""

import atexit
import contextlib
import os
import signal
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Unpack

from audioldm2_client._abandoned import run_together
from audioldm2_client._call import Call, drive
from audioldm2_client._connection import TlsOptions
from audioldm2_client._core import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_READY_TIMEOUT_S,
    DEFAULT_TIMEOUT_S,
    DEFAULT_URL,
    ClientCore,
)
from audioldm2_client._flow import ready_flow, wait_until_ready_flow
from audioldm2_client._generation import Generation
from audioldm2_client._jobs import DEFAULT_MODEL_NAME, JOBS_TIMEOUT_S, ProgressCallback
from audioldm2_client._options import GenerationOptions, lists_options
from audioldm2_client._request import check_timeout
from audioldm2_client._result import GenerationResult
from audioldm2_client._signals import ENDING_SIGNALS, close_on_signals
from audioldm2_client._tracing import read_parent
from audioldm2_client._transport import Transport, make_transport
from audioldm2_client._url import ServerAddress

_open_clients: "weakref.WeakSet[AudioLDM2Client]" = weakref.WeakSet()


def _forget_in_child() -> None:
    """Close all clients in a forked child, and tell the servers nothing: what they run belongs to the parent."""
    for client in list(_open_clients):
        client._forget()
    _open_clients.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


@atexit.register
def _close_all() -> None:
    """Cancel what still runs when the process exits, also on the servers, while threads can still be joined."""
    for client in list(_open_clients):
        client.cancel_all()  # also where an exception has ended `close` before its end
        client.close()


class AudioLDM2Client(ClientCore):
    """Generate audio on a Triton server. One client may be used by several threads at the same time.

    Args:
        url: "host:port" or "grpc://host:port" for gRPC (Triton's port 8001), "http://host:port" for HTTP (8000), with
            grpcs and https for TLS. Several, in a sequence, are servers that can replace each other: the one that
            answered last is asked first.
        model_name: the ensemble to call; others of the same contract may be on the same server.
        timeout_s: time allowed for one generation, seconds, from the connection to the last byte, with all retries.
            The default, 600, is long because a CPU needs minutes for one; making a connection is allowed 5 of them.
        max_retries: how many times a request is sent again after all servers have failed without working on it: they
            were busy, or no connection was made. 0 and up; 2. The pauses grow from 0.25 s to 8 s, with jitter.
        tls: files for TLS. "host:port" then means TLS too.
        headers: sent with every call, such as an API key for a proxy: {"authorization": "Bearer ..."}. No message of
            this package shows them.

    Raises:
        TypeError, ValueError: a bad url, timeout, header or TLS file.
        OSError: a TLS file can't be read.

    Nothing is sent before the first call. Close the client after use, or use it as a context manager.
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
        self._lock = threading.Lock()
        self._transports: dict[ServerAddress, Transport] = {}
        self._calls: weakref.WeakSet[Call] = weakref.WeakSet()  # their threads hold them
        _open_clients.add(self)

    @lists_options
    def generate(
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
        """Generate audio for one prompt or several, and wait for it.

        Options that are left out, or None, aren't sent: the server's defaults hold. The defaults named here are those
        of an unchanged server. The server also checks the ranges. Ctrl-C, or any other exception in here, cancels the
        generation on the server too.

        Args:
            prompt: what to hear; one text, or P of them for P sounds (they share every other option).
            request_id: the request's id, 1 to 128 bytes of printable text; a random one. It stands in the server's log,
                and those who know it can watch and cancel the request: take one that can't be guessed.
            traceparent: the trace that this belongs to, as W3C defines it, and `tracestate` with it. What isn't valid
                is ignored. Without it, OpenTelemetry's current span is taken, if there is one.
            tracestate: see `traceparent`.
            timeout_s: time allowed for this generation, seconds; the client's `timeout_s`. The server is told it too.
            on_progress: called in this thread with each new `Progress`; the server is asked every 0.2 s. What it raises
                cancels the generation, and comes out here. Never called where the server has no model `jobs`.
            **options: see `GenerationOptions`.

        Returns:
            P x W waveforms, W = num_waveforms_per_prompt.

        Raises:
            InvalidRequestError: the server refuses a value, in its own words; or a value can't be sent at all.
            ServerBusyError: overloaded; safe to send again.
            RequestCancelledError: the server ended the request, because it was told to.
            DeadlineExceededError: not done within `timeout_s`.
            ServerUnreachableError: no server at the address, or the connection was lost.
            AccessDeniedError: the server, or a proxy before it, refuses the credentials.
            ModelNotFoundError: the server doesn't have the model.
            ServerFaultError: the server failed.
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
            generation.watch(on_progress)
            return generation.result()
        except BaseException:
            if not generation.done():
                generation.cancel()
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
    ) -> Generation:
        """Start a generation in a thread of its own, and return its handle at once.

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
            RuntimeError: the client is closed.
        """
        request = self._prepare(prompt, timeout_s, request_id, options)
        parent = read_parent(traceparent, tracestate)
        with self._lock:
            self._check_open()
            call = Call(
                request, self._transport_for, self._route, self.max_retries, tell=self._tell_to_stop, parent=parent
            )
            self._calls.add(call)  # before it runs: whatever comes between, `close` finds it
            call.start()
        return Generation(call)

    def is_ready(self) -> bool:
        """Return whether one of the servers says that the ensemble is ready; False where none answers.

        Raises:
            RuntimeError: the client is closed.
        """
        self._check_open()
        return drive(ready_flow(self.model_name, self._route, JOBS_TIMEOUT_S), self._transport_for)

    def wait_until_ready(self, timeout_s: float = DEFAULT_READY_TIMEOUT_S) -> None:
        """Wait until one of the servers says that the ensemble is ready.

        Args:
            timeout_s: time to wait, seconds, > 0; 60.

        Raises:
            DeadlineExceededError: none was in time.
            RuntimeError: the client is closed.
        """
        self._check_open()
        flow = wait_until_ready_flow(self.model_name, self._route, check_timeout(timeout_s), time.monotonic)
        drive(flow, self._transport_for)

    def cancel_all(self) -> int:
        """Cancel everything that this client runs, here and on the servers; those who wait get RequestCancelledError.

        The client stays usable. This takes milliseconds; up to 2 s where a server doesn't answer. It may be called from
        any thread, and waits: a signal handler must leave it to a thread, see `close_on_signals`.

        Returns:
            How many generations were cancelled.
        """
        with self._lock:
            running = [call for call in self._calls if not call.done()]
        run_together([call.cancel for call in running])
        return len(running)

    def close_on_signals(
        self, signals: Sequence[signal.Signals] = ENDING_SIGNALS
    ) -> contextlib.AbstractContextManager[None]:
        """Close this client when one of the signals arrives while the block runs; it is for the main thread.

        The generations are cancelled, on the servers too, in a thread that the block starts: those who wait for them
        get RequestCancelledError at once, in whatever thread. Then the signal does what it did before the block: an
        earlier handler is called, as Python's own, which raises KeyboardInterrupt for SIGINT; where there was none, and
        the signal would have ended the process without another word, SystemExit is raised, with 128 + the number. What
        is ignored stays so. Nothing else in this package touches signals.

        Args:
            signals: SIGINT and SIGTERM. A program without a terminal may take SIGHUP for something else.

        Raises:
            ValueError: this isn't the main thread.
        """
        return close_on_signals(self.close, signals)

    def close(self) -> None:
        """Cancel what still runs and free the connections.

        Closing again does nothing; `generate` and `submit` then raise RuntimeError.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.cancel_all()
        _open_clients.discard(self)
        with self._lock:
            for transport in self._transports.values():
                transport.close()
            self._transports.clear()

    def _forget(self) -> None:
        """Close without the lock: a thread of the parent may have held it at the fork, and can't release it here."""
        self._lock = threading.Lock()
        self._closed = True
        self._transports = {}

    def _transport_for(self, address: ServerAddress) -> Transport:
        with self._lock:
            if address not in self._transports:
                self._check_open()
                self._transports[address] = make_transport(address, self._connection)
            return self._transports[address]

    def __enter__(self) -> "AudioLDM2Client":
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
