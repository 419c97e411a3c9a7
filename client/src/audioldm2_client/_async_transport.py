"""asyncio I/O: one inference over gRPC or HTTP, through tritonclient. The asyncio twin of `_transport`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Protocol

from audioldm2_client import _transport
from audioldm2_client._connection import ConnectionOptions
from audioldm2_client._errors import client_deadline_error, error_from_status, unreachable_error
from audioldm2_client._request import InferenceRequest
from audioldm2_client._result import GetTensor
from audioldm2_client._transport import grpc_arguments, infer_arguments, make_ssl_context
from audioldm2_client._url import ServerAddress


class AsyncTransport(Protocol):
    """One way to reach a server. Belongs to the event loop that it was made in."""

    async def infer(self, request: InferenceRequest) -> GetTensor:
        """Run one inference and return access to its outputs. Cancelling the task drops it.

        Raises:
            AudioLDM2Error: the inference failed.
        """

    async def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """Return whether the server says that the model is ready; False where it can't be asked."""

    async def close(self) -> None:
        """Free the connections."""


def make_async_transport(address: ServerAddress, options: ConnectionOptions) -> AsyncTransport:
    """Return the transport for the address' protocol."""
    return AsyncHttpTransport(address, options) if address.protocol == "http" else AsyncGrpcTransport(address, options)


class AsyncGrpcTransport:
    """gRPC over one channel, which makes, keeps and remakes its connection by itself."""

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import tritonclient.grpc.aio as triton

        self._address = address
        self._headers = dict(options.headers)
        self._triton = triton
        self._client = triton.InferenceServerClient(**grpc_arguments(address, options))

    async def infer(self, request: InferenceRequest) -> GetTensor:
        """See `AsyncTransport`."""
        try:
            result = await self._client.infer(
                **infer_arguments(self._triton, request), client_timeout=request.timeout_s, headers=self._headers
            )
        except self._triton.InferenceServerException as error:
            raise error_from_status(error.status(), error.message(), request, self._address) from error
        as_numpy: GetTensor = result.as_numpy
        return as_numpy

    async def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `AsyncTransport`."""
        try:
            return bool(await self._client.is_model_ready(model_name, headers=self._headers, client_timeout=timeout_s))
        except self._triton.InferenceServerException:
            return False

    async def close(self) -> None:
        """See `AsyncTransport`."""
        await self._client.close()


class AsyncHttpTransport:
    """HTTP with binary tensors, over one connection per call, as `HttpTransport`."""

    def __init__(self, address: ServerAddress, options: ConnectionOptions) -> None:
        import aiohttp
        import tritonclient.http.aio as triton

        self._address = address
        self._options = options
        self._aiohttp = aiohttp
        self._triton = triton

    async def infer(self, request: InferenceRequest) -> GetTensor:
        """See `AsyncTransport`."""
        try:
            async with self._connected() as client:
                headers = dict(self._options.headers)  # tritonclient adds to it
                inference = client.infer(**infer_arguments(self._triton, request), headers=headers)
                result = await asyncio.wait_for(inference, request.timeout_s)
        except self._triton.InferenceServerException as error:
            raise error_from_status(error.status(), error.message(), request, self._address) from error
        except (self._aiohttp.ClientError, OSError) as error:  # a TimeoutError is an OSError
            if isinstance(error, TimeoutError) and not isinstance(error, self._aiohttp.ClientError):
                raise client_deadline_error(request, self._address) from error
            raise self._unreachable(error, request) from error
        as_numpy: GetTensor = result.as_numpy
        return as_numpy

    async def is_ready(self, model_name: str, timeout_s: float) -> bool:
        """See `AsyncTransport`."""
        try:
            async with self._connected() as client:
                headers = dict(self._options.headers)
                return bool(await asyncio.wait_for(client.is_model_ready(model_name, headers=headers), timeout_s))
        except (self._triton.InferenceServerException, self._aiohttp.ClientError, OSError):
            return False

    async def close(self) -> None:
        """See `AsyncTransport`. No connection outlives its call."""

    def _unreachable(self, error: BaseException, request: InferenceRequest) -> Exception:
        sent = not isinstance(error, (self._aiohttp.ClientConnectorError, self._aiohttp.ConnectionTimeoutError))
        return unreachable_error(str(error) or type(error).__name__, request, self._address, sent=sent)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        import ssl

        context = make_ssl_context(self._options, ssl.create_default_context) if self._address.secure else None
        client = self._triton.InferenceServerClient(
            self._address.target,
            ssl=self._address.secure,
            ssl_context=context if context is not None else True,  # True: aiohttp's word for "as usual"
        )
        # tritonclient's only limit is one for the whole call, which is set above.
        limits = self._aiohttp.ClientTimeout(total=None, sock_connect=_transport.CONNECT_TIMEOUT_S)
        client._stub = _Session(client._stub, limits)
        try:
            yield client
        finally:
            await client.close()


class _Session:
    """aiohttp's session as tritonclient uses it, without redirects: they would carry the headers elsewhere."""

    def __init__(self, session: Any, limits: Any) -> None:
        self._session = session
        self._limits = limits

    async def get(self, **arguments: Any) -> Any:
        return await self._session.get(**arguments, allow_redirects=False, timeout=self._limits)

    async def post(self, **arguments: Any) -> Any:
        return await self._session.post(**arguments, allow_redirects=False, timeout=self._limits)

    async def close(self) -> None:
        await self._session.close()
