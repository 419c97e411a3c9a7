"""Blocking I/O: one inference over gRPC (grpcio) or HTTP (httpx).

Both are imported at the first call, not with this package: they take a tenth of a second each.
"""

import concurrent.futures
import contextlib
import contextvars
import socket
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from audioldm2_client import _kserve
from audioldm2_client._answers import (
    HttpAnswer,
    error_from_grpc,
    error_from_http,
    http_errors,
    outputs_from_answer,
    outputs_from_message,
    says_ready,
    should_probe_grpc,
    should_probe_http,
    should_read_on,
)
from audioldm2_client._cancel_token import CallCancelledError, CancelToken
from audioldm2_client._connection import ConnectionOptions
from audioldm2_client._errors import cancelled_here_error, client_deadline_error, unreachable_error
from audioldm2_client._exceptions import AudioLDM2Error, ModelNotFoundError
from audioldm2_client._jobs import JOBS_TIMEOUT_S, Progress, build_jobs_request, parse_progress
from audioldm2_client._network import (
    HEARTBEAT_S,
    PING_TIMEOUT_S,
    channel_options,
    http_client_arguments,
    http_timeouts,
    http_transport_arguments,
    read_channel_credentials,
)
from audioldm2_client._port_probe import probe_port
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GetTensor
from audioldm2_client._silence import Silence
from audioldm2_client._url import ServerAddress

if TYPE_CHECKING:
    import httpx


class Transport(Protocol):
    """One way to reach a server. Safe to use from several threads."""

    def infer(self, request: InferenceRequest, token: CancelToken) -> GetTensor:
        """Run one inference and return access to its outputs.

        Raises:
            AudioLDM2Error: the inference failed, or was cancelled.
        """

    def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """Return whether the server says that itself and the model are ready; False where it can't be asked."""

    def close(self) -> None:
        """Free the connections."""


def make_transport(address: ServerAddress, options: ConnectionOptions) -> Transport:
    """Return the transport for the address' protocol."""
    return HttpTransport(address, options) if address.protocol == "http" else GrpcTransport(address, options)


class GrpcTransport:
    """gRPC over one channel, which makes, keeps and remakes its connection by itself."""

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import grpc

        from audioldm2_client import _kserve_grpc as messages

        self._address = address
        self._headers, self._metadata = options.headers, tuple(options.headers.items())
        self._grpc, self._messages = grpc, messages
        if address.secure:
            credentials = grpc.ssl_channel_credentials(**read_channel_credentials(options))
            self._channel = grpc.secure_channel(address.target, credentials, channel_options(address))
        else:
            self._channel = grpc.insecure_channel(address.target, channel_options(address))
        self._infer = self._channel.unary_unary(messages.INFER, *messages.INFER_CODECS)
        self._model_ready = self._channel.unary_unary(messages.MODEL_READY, *messages.MODEL_READY_CODECS)
        self._server_ready = self._channel.unary_unary(messages.SERVER_READY, *messages.SERVER_READY_CODECS)
        self._server_live = self._channel.unary_unary(messages.SERVER_LIVE)

    def infer(self, request: InferenceRequest, token: CancelToken) -> GetTensor:
        """See `Transport`."""
        message = self._messages.build_message(request)
        metadata = tuple({**self._headers, **request.headers}.items())
        call = self._infer.future(message, timeout=request.timeout_s, metadata=metadata)
        try:
            with token.on_cancel(call.cancel):
                answer = self._wait_for(call)
        except (CallCancelledError, self._grpc.FutureCancelledError) as error:
            call.cancel()
            raise cancelled_here_error(request) from error
        except self._grpc.RpcError as error:
            if token.cancelled:
                raise cancelled_here_error(request) from error
            spoken = probe_port(self._address) if should_probe_grpc(error) else None
            raise error_from_grpc(error, request, self._address, spoken) from error
        return outputs_from_message(answer, request)

    def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `Transport`."""
        end = time.monotonic() + timeout_s
        questions = (
            (self._server_ready, self._messages.ServerReadyRequest()),
            (self._model_ready, self._messages.ModelReadyRequest(name=model_name)),
        )
        try:
            return all(
                ask(message, timeout=max(end - time.monotonic(), 0.0), metadata=self._metadata).ready
                for ask, message in questions
            )
        except self._grpc.RpcError:
            return False

    def close(self) -> None:
        """See `Transport`."""
        self._channel.close()

    def _wait_for(self, call: Any) -> Any:
        """Wait for the answer, with a sign of life now and then: see `_network`."""
        while True:
            try:
                return call.result(HEARTBEAT_S)
            except self._grpc.FutureTimeoutError:
                self._server_live.future(b"", timeout=PING_TIMEOUT_S, metadata=self._metadata)


class HttpTransport:
    """HTTP with binary tensors, over one connection per call: simpler than keeping them, at under a millisecond."""

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import httpx

        self._address = address
        transport = httpx.HTTPTransport(**http_transport_arguments(address, options))
        self._client = httpx.Client(transport=transport, **http_client_arguments(address, options))

    def infer(self, request: InferenceRequest, token: CancelToken) -> GetTensor:
        """See `Transport`."""
        body, headers = _kserve.build_body(request)
        path = _kserve.infer_path(request.model_name)
        headers |= request.headers
        call = _HttpCall(self._client, "POST", path, request.timeout_s, content=body, headers=headers)
        try:
            with token.on_cancel(call.end):
                self._wait_for(call, request)
            answer = call.answer.result()
        except CallCancelledError as error:
            raise cancelled_here_error(request) from error
        except http_errors() as error:
            if token.cancelled:
                raise cancelled_here_error(request) from error
            spoken = probe_port(self._address) if should_probe_http(error) else None
            raise error_from_http(error, request, self._address, spoken) from error
        finally:
            call.end()
        return outputs_from_answer(answer, request, self._address)

    def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `Transport`."""
        end = time.monotonic() + timeout_s
        paths = (_kserve.SERVER_READY_PATH, _kserve.ready_path(model_name))
        return all(self._says_ready(path, end - time.monotonic()) for path in paths)

    def close(self) -> None:
        """See `Transport`."""
        self._client.close()

    def _says_ready(self, path: str, timeout_s: float) -> bool:
        call = _HttpCall(self._client, "GET", path, timeout_s)
        try:
            return says_ready(call.answer.result(timeout_s))
        except http_errors():
            return False
        finally:
            call.end()

    def _wait_for(self, call: "_HttpCall", request: InferenceRequest) -> None:
        """Wait until the call is over, and from HEARTBEAT_S on look whether its connection is alive.

        Raises:
            DeadlineExceededError: it isn't over in time.
        """
        end = time.monotonic() + request.timeout_s
        if not concurrent.futures.wait([call.answer], min(HEARTBEAT_S, request.timeout_s)).done:
            threading.Thread(target=self._look_after, args=(call, request), daemon=True).start()
            concurrent.futures.wait([call.answer], end - time.monotonic())
        if not call.answer.done():
            raise client_deadline_error(request, self._address)

    def _look_after(self, call: "_HttpCall", request: InferenceRequest) -> None:
        """Ask the model `jobs` on other connections, until the call is over, and fail it if it must be lost."""
        silence = Silence()
        while not call.answer.done():
            outcome: Progress | AudioLDM2Error
            question = build_jobs_request(request, "status", JOBS_TIMEOUT_S)
            try:
                outcome = parse_progress(self.infer(question, CancelToken()), question)
            except (ModelNotFoundError, RuntimeError):  # RuntimeError: the client is closed, or Python ends
                return
            except AudioLDM2Error as error:
                outcome = error
            if (reason := silence.look(outcome, call.received)) is not None:
                call.fail(unreachable_error(reason, request, self._address, sent=True))
            concurrent.futures.wait([call.answer], HEARTBEAT_S)


class _HttpCall:
    """One request in a thread of its own, which another thread can end at any time, even while a name is looked up.

    Attributes:
        answer: what has come; `CallCancelledError` where the call was ended before that.
        received: bytes of the answer's body so far.
    """

    def __init__(self, client: "httpx.Client", method: str, path: str, timeout_s: float, **arguments: Any) -> None:
        self.answer: concurrent.futures.Future[HttpAnswer] = concurrent.futures.Future()
        self.received = 0
        self._lock = threading.Lock()
        self._ended = False
        self._socket: socket.socket | None = None
        self._request = client.build_request(
            method, path, timeout=http_timeouts(timeout_s), extensions={"trace": self._note_socket}, **arguments
        )
        self._client = client
        run = contextvars.copy_context().run  # libraries that trace connections look for the current span
        threading.Thread(target=run, args=(self._run,), name=f"audioldm2-{method}", daemon=True).start()

    def end(self) -> None:
        """Let go of the connection; nothing happens where the call is over."""
        with self._lock:
            self._ended = True
            self._shut_down()
        self.fail(CallCancelledError())

    def fail(self, error: Exception) -> None:
        """Give the call this end, unless it has one."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            self.answer.set_exception(error)

    def _run(self) -> None:
        try:
            answer = self._exchange()
        except Exception as error:
            self.fail(error)
        else:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                self.answer.set_result(answer)
        finally:
            if self._client.is_closed and self._socket is not None:
                self._socket.close()  # httpx doesn't know of one that was being made while it was closed

    def _exchange(self) -> HttpAnswer:
        response = self._client.send(self._request, stream=True)
        chunks: list[bytes] = []
        try:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                self.received += len(chunk)
                if not should_read_on(response, self.received):
                    break
        except http_errors():
            if response.status_code == 200:
                raise
        finally:
            response.close()
        return HttpAnswer(response.status_code, response.headers, b"".join(chunks))

    def _note_socket(self, event: str, info: dict[str, Any]) -> None:
        """Keep what `end` shuts down; called by httpx, in the thread of the call."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            with self._lock:
                self._socket = info["return_value"].get_extra_info("socket")
                if self._ended:
                    self._shut_down()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # Not SSLSocket.shutdown, which would token the encryption under the other thread's hands.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)
