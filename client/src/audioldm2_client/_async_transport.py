"""asyncio I/O: one inference over gRPC (grpcio) or HTTP (httpx). The asyncio twin of `_transport`."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Protocol

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
from audioldm2_client._connection import ConnectionOptions
from audioldm2_client._errors import client_deadline_error, unreachable_error
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


class AsyncTransport(Protocol):
    """One way to reach a server. Belongs to the event loop that it was made in."""

    async def infer(self, request: InferenceRequest) -> GetTensor:
        """Run one inference and return access to its outputs. Cancelling the task drops it.

        Raises:
            AudioLDM2Error: the inference failed.
        """

    async def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """Return whether the server says that itself and the model are ready; False where it can't be asked."""

    async def close(self) -> None:
        """Free the connections."""


def make_async_transport(address: ServerAddress, options: ConnectionOptions) -> AsyncTransport:
    """Return the transport for the address' protocol."""
    return AsyncHttpTransport(address, options) if address.protocol == "http" else AsyncGrpcTransport(address, options)


class AsyncGrpcTransport:
    """gRPC over one channel, which makes, keeps and remakes its connection by itself."""

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import grpc
        import grpc.aio

        from audioldm2_client import _kserve_grpc as messages

        self._address = address
        self._headers, self._metadata = options.headers, tuple(options.headers.items())
        self._grpc, self._messages = grpc, messages
        if address.secure:
            credentials = grpc.ssl_channel_credentials(**read_channel_credentials(options))
            self._channel = grpc.aio.secure_channel(address.target, credentials, channel_options(address))
        else:
            self._channel = grpc.aio.insecure_channel(address.target, channel_options(address))
        self._infer = self._channel.unary_unary(messages.INFER, *messages.INFER_CODECS)
        self._model_ready = self._channel.unary_unary(messages.MODEL_READY, *messages.MODEL_READY_CODECS)
        self._server_ready = self._channel.unary_unary(messages.SERVER_READY, *messages.SERVER_READY_CODECS)
        self._server_live = self._channel.unary_unary(messages.SERVER_LIVE)

    async def infer(self, request: InferenceRequest) -> GetTensor:
        """See `AsyncTransport`."""
        message = self._messages.build_message(request)
        signs_of_life = asyncio.create_task(self._show_signs_of_life())
        try:
            metadata = tuple({**self._headers, **request.headers}.items())
            answer = await self._infer(message, timeout=request.timeout_s, metadata=metadata)
        except self._grpc.RpcError as error:
            spoken = await asyncio.to_thread(probe_port, self._address) if should_probe_grpc(error) else None
            raise error_from_grpc(error, request, self._address, spoken) from error
        finally:
            signs_of_life.cancel()
        return outputs_from_message(answer, request)

    async def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `AsyncTransport`."""
        server, model = self._messages.ServerReadyRequest(), self._messages.ModelReadyRequest(name=model_name)
        try:
            answers = await asyncio.gather(
                self._server_ready(server, timeout=timeout_s, metadata=self._metadata),
                self._model_ready(model, timeout=timeout_s, metadata=self._metadata),
            )
            return all(answer.ready for answer in answers)
        except self._grpc.RpcError:
            return False

    async def close(self) -> None:
        """See `AsyncTransport`."""
        await self._channel.close()

    async def _show_signs_of_life(self) -> None:
        """Ask the server now and then whether it is alive: see `_network`."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._server_live(b"", timeout=PING_TIMEOUT_S, metadata=self._metadata)
            except self._grpc.RpcError:
                continue


class AsyncHttpTransport:
    """HTTP with binary tensors, over one connection per call, as `HttpTransport`."""

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import httpx

        self._address = address
        transport = httpx.AsyncHTTPTransport(**http_transport_arguments(address, options))
        self._client = httpx.AsyncClient(transport=transport, **http_client_arguments(address, options))

    async def infer(self, request: InferenceRequest) -> GetTensor:
        """See `AsyncTransport`."""
        body, headers = _kserve.build_body(request)
        path = _kserve.infer_path(request.model_name)
        headers |= request.headers
        received = _Received()
        deadline = asyncio.timeout(request.timeout_s)
        try:
            async with deadline:
                call = self._exchange("POST", path, request.timeout_s, received, content=body, headers=headers)
                answer = await _unless_lost(call, self._look_after(received, request))
        except http_errors() as error:  # a TimeoutError is an OSError
            if deadline.expired():
                raise client_deadline_error(request, self._address) from error
            spoken = await asyncio.to_thread(probe_port, self._address) if should_probe_http(error) else None
            raise error_from_http(error, request, self._address, spoken) from error
        return outputs_from_answer(answer, request, self._address)

    async def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `AsyncTransport`."""
        try:
            async with asyncio.timeout(timeout_s):
                for path in (_kserve.SERVER_READY_PATH, _kserve.ready_path(model_name)):
                    if not says_ready(await self._exchange("GET", path, timeout_s, _Received())):
                        return False
                return True
        except http_errors():
            return False

    async def close(self) -> None:
        """See `AsyncTransport`."""
        await self._client.aclose()

    async def _exchange(
        self, method: str, path: str, timeout_s: float, received: "_Received", **arguments: Any
    ) -> HttpAnswer:
        chunks: list[bytes] = []
        async with self._client.stream(method, path, timeout=http_timeouts(timeout_s), **arguments) as response:
            try:
                async for chunk in response.aiter_bytes():
                    chunks.append(chunk)
                    received.bytes += len(chunk)
                    if not should_read_on(response, received.bytes):
                        break
            except http_errors():
                if response.status_code == 200:
                    raise
        return HttpAnswer(response.status_code, response.headers, b"".join(chunks))

    async def _look_after(self, received: "_Received", request: InferenceRequest) -> None:
        """Ask the model `jobs` on other connections, until there is no such model.

        Raises:
            ServerUnreachableError: the connection must be lost.
        """
        silence = Silence()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            outcome: Progress | AudioLDM2Error
            question = build_jobs_request(request, "status", JOBS_TIMEOUT_S)
            try:
                outcome = parse_progress(await self.infer(question), question)
            except ModelNotFoundError:
                return
            except AudioLDM2Error as error:
                outcome = error
            if (reason := silence.look(outcome, received.bytes)) is not None:
                raise unreachable_error(reason, request, self._address, sent=True)


class _Received:
    """How much of an answer's body has come."""

    bytes = 0


async def _unless_lost(call: Coroutine[Any, Any, HttpAnswer], looking_after: Coroutine[Any, Any, None]) -> HttpAnswer:
    """Return the result of `call`; what runs beside it ends it by raising an exception."""
    calling, looking = asyncio.create_task(call), asyncio.create_task(looking_after)
    try:
        await asyncio.wait((calling, looking), return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            looking.result()  # raises, or had nothing to say
        return await calling
    finally:
        calling.cancel()
        looking.cancel()
        await asyncio.gather(calling, looking, return_exceptions=True)
