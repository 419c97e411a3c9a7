"""Blocking I/O: one inference over gRPC or HTTP, through tritonclient.

tritonclient is imported at the first call, not with this package: it takes a tenth of a second per protocol.
"""

import concurrent.futures
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from audioldm2_client._cancel_token import CallCancelledError, CancelToken
from audioldm2_client._connection import ConnectionOptions
from audioldm2_client._errors import (
    cancelled_here_error,
    client_deadline_error,
    error_from_status,
    unreachable_error,
)
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GetTensor
from audioldm2_client._url import ServerAddress

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT_S = 5.0
"""Time allowed for making a connection; part of the time allowed for the whole call."""

# gRPC fails calls while it waits before it connects again: at most so long, because the retries are made here.
RECONNECT_DELAY_MS = (100, 1000)


class Transport(Protocol):
    """One way to reach a server. Safe to use from several threads."""

    def infer(self, request: InferenceRequest, token: CancelToken) -> GetTensor:
        """Run one inference and return access to its outputs.

        Raises:
            AudioLDM2Error: the inference failed, or was cancelled.
        """

    def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """Return whether the server says that the model is ready; False where it can't be asked."""

    def release_thread(self) -> None:
        """Free what belongs to the calling thread, which is about to end."""

    def close(self) -> None:
        """Free the connections."""


def make_transport(address: ServerAddress, options: ConnectionOptions) -> Transport:
    """Return the transport for the address' protocol."""
    return HttpTransport(address, options) if address.protocol == "http" else GrpcTransport(address, options)


class GrpcTransport:
    """gRPC over one channel, which makes, keeps and remakes its connection by itself."""

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import tritonclient.grpc as triton

        self._address = address
        self._headers = dict(options.headers)
        self._triton = triton
        self._client = triton.InferenceServerClient(**grpc_arguments(address, options))

    def infer(self, request: InferenceRequest, token: CancelToken) -> GetTensor:
        """See `Transport`."""
        future: concurrent.futures.Future[GetTensor] = concurrent.futures.Future()

        def answer(result: Any, error: Any) -> None:
            if error is None:
                future.set_result(result.as_numpy)
            else:
                future.set_exception(error)

        try:
            call = self._client.async_infer(
                callback=answer,
                client_timeout=request.timeout_s,
                headers=self._headers,
                **infer_arguments(self._triton, request),
            )
            with token.on_cancel(call.cancel):
                return future.result()
        except CallCancelledError as error:
            call.cancel()
            raise cancelled_here_error(request) from error
        except self._triton.InferenceServerException as error:
            if token.cancelled:
                raise cancelled_here_error(request) from error
            raise error_from_status(error.status(), error.message(), request, self._address) from error

    def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `Transport`."""
        try:
            return bool(self._client.is_model_ready(model_name, headers=self._headers, client_timeout=timeout_s))
        except self._triton.InferenceServerException:
            return False

    def release_thread(self) -> None:
        """See `Transport`. Nothing belongs to a thread."""

    def close(self) -> None:
        """See `Transport`."""
        self._client.close()


class HttpTransport:
    """HTTP with binary tensors, over one connection per call.

    tritonclient's HTTP client belongs to one thread, and its timeouts to the connection: one per call is simpler than
    a pool of them, and costs under a millisecond.
    """

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import gevent  # type: ignore[import-untyped]
        import tritonclient.http as triton

        self._address = address
        self._options = options
        self._gevent = gevent
        self._triton = triton

    def infer(self, request: InferenceRequest, token: CancelToken) -> GetTensor:
        """See `Transport`."""
        # network_timeout would limit each read from the socket; this limits the whole call.
        deadline = self._gevent.Timeout(request.timeout_s)
        try:
            with self._connected() as client, self._ended_by(token), deadline:
                result = client.infer(**infer_arguments(self._triton, request), headers=dict(self._options.headers))
        except self._gevent.Timeout as error:
            if error is not deadline:
                raise
            raise client_deadline_error(request, self._address) from error
        except CallCancelledError as error:
            raise cancelled_here_error(request) from error
        except self._triton.InferenceServerException as error:
            raise error_from_status(error.status(), error.message(), request, self._address) from error
        except (OSError, HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise unreachable_error(reason, request, self._address, sent=may_have_sent(error)) from error
        as_numpy: GetTensor = result.as_numpy
        return as_numpy

    def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `Transport`."""
        try:
            with self._connected() as client, self._gevent.Timeout(timeout_s):
                return bool(client.is_model_ready(model_name, headers=dict(self._options.headers)))
        except (self._gevent.Timeout, self._triton.InferenceServerException, OSError, HTTPException):
            return False

    def release_thread(self) -> None:
        """See `Transport`. gevent has an event loop for each thread that it was used in."""
        self._gevent.get_hub().destroy()

    def close(self) -> None:
        """See `Transport`. No connection outlives its call."""

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        hub = self._gevent.get_hub()
        if KeyboardInterrupt not in hub.NOT_ERROR:  # gevent would print Ctrl-C as well as raise it
            hub.NOT_ERROR = (*hub.NOT_ERROR, KeyboardInterrupt)
        client = self._triton.InferenceServerClient(
            self._address.target,
            connection_timeout=CONNECT_TIMEOUT_S,
            network_timeout=None,
            ssl=self._address.secure,
            ssl_context_factory=self._make_ssl_context if self._address.secure else None,
        )
        try:
            yield client
        finally:
            client.close()

    @contextmanager
    def _ended_by(self, token: CancelToken) -> Iterator[None]:
        """Let another thread throw `CallCancelledError` into what waits here."""
        watcher = self._gevent.get_hub().loop.async_()
        watcher.start(self._gevent.getcurrent().throw, CallCancelledError())
        try:
            with token.on_cancel(watcher.send):
                yield
        finally:
            watcher.stop()
            watcher.close()

    def _make_ssl_context(self, cafile: str | None = None) -> "ssl.SSLContext":
        import gevent.ssl  # type: ignore[import-untyped]

        return make_ssl_context(self._options, gevent.ssl.create_default_context, cafile)


def make_ssl_context(
    options: ConnectionOptions, create: "Callable[..., ssl.SSLContext]", ca_file: str | None = None
) -> "ssl.SSLContext":
    """Return what HTTP needs for TLS; `ca_file` holds where the options name none."""
    tls = options.tls
    context = create(cafile=tls.ca_file if tls is not None and tls.ca_file is not None else ca_file)
    if tls is not None and tls.cert_file is not None:
        context.load_cert_chain(tls.cert_file, tls.key_file)
    return context


def may_have_sent(error: BaseException) -> bool:
    """Whether something may have been sent before an error of a socket."""
    # Without a number it is this client's own limit, which holds for the connecting alone; with one, it's the kernel's.
    if isinstance(error, TimeoutError):
        return error.errno is not None
    return not isinstance(error, ConnectionRefusedError) and type(error).__name__ not in ("gaierror", "herror")


def grpc_arguments(address: ServerAddress, options: ConnectionOptions) -> dict[str, Any]:
    """Return the arguments of tritonclient's gRPC clients, blocking or not."""
    tls = options.tls
    first_delay_ms, longest_delay_ms = RECONNECT_DELAY_MS
    return {
        "url": address.target,
        "ssl": address.secure,
        "root_certificates": tls.ca_file if tls is not None else None,
        "certificate_chain": tls.cert_file if tls is not None else None,
        "private_key": tls.key_file if tls is not None else None,
        "channel_args": [
            # Unlimited (-1): 160 s of audio are 10 MB per waveform, gRPC's own limit is 4 MB.
            ("grpc.max_send_message_length", -1),
            ("grpc.max_receive_message_length", -1),
            # In spite of its name this is also the time allowed for one connection attempt.
            ("grpc.min_reconnect_backoff_ms", int(CONNECT_TIMEOUT_S * 1000)),
            ("grpc.initial_reconnect_backoff_ms", first_delay_ms),
            ("grpc.max_reconnect_backoff_ms", longest_delay_ms),
        ],
    }


def infer_arguments(triton: ModuleType, request: InferenceRequest) -> dict[str, Any]:
    """Return the arguments of `InferenceServerClient.infer` that gRPC and HTTP have in common."""
    inputs = []
    for tensor in request.inputs:
        triton_input = triton.InferInput(tensor.name, list(tensor.data.shape), tensor.datatype)
        triton_input.set_data_from_numpy(tensor.data)
        inputs.append(triton_input)
    return {
        "model_name": request.model_name,
        "inputs": inputs,
        "request_id": request.id,
        # Tells the server when nobody waits any more; it isn't told when an HTTP connection closes.
        "timeout": request.timeout_us,
    }
