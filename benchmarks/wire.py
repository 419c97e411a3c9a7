"""Requests as bytes, over HTTP and gRPC, from callers that cost little: they share the machine with the server."""

import asyncio
import json
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, Self

import grpc
import grpc.aio
import httpx
import numpy as np
from tritonclient.grpc import service_pb2

from tests.helpers.triton_configs import INPUT_TYPES

OK, LEFT, TIMED_OUT = "ok", "left", "timed out"
PROTOCOLS = ("HTTP", "gRPC")
INFER = "/inference.GRPCInferenceService/ModelInfer"
JSON_LENGTH = "inference-header-content-length"
MAX_MESSAGE_BYTES = 1 << 28
_TAG = re.compile(r"\[([A-Z_]+)\]")
_TYPES = INPUT_TYPES | {"request_id": ("BYTES", np.object_), "action": ("BYTES", np.object_)}

Value = str | int | float


@dataclass(frozen=True)
class WireRequest:
    """One inference.

    Attributes:
        request_id: Empty for none.
        inputs: Each value, or a list of them.
        timeout_us: The request parameter `timeout`; 0 for none.
        model: An ensemble or a job board.
        output: The only output that is asked for; empty for all.
    """

    request_id: str
    inputs: Mapping[str, Value | list[str]]
    timeout_us: int = 0
    model: str = "audioldm2"
    output: str = "audio"

    def http_body(self) -> bytes:
        """Return the JSON; outputs are asked for in binary, which costs nobody anything."""
        inputs = [
            {"name": name, "datatype": _TYPES[name][0], "shape": [len(values)], "data": values}
            for name, values in self._lists()
        ]
        body: dict[str, Any] = {"id": self.request_id, "inputs": inputs, "parameters": self._parameters()}
        if self.output:
            body["outputs"] = [{"name": self.output, "parameters": {"binary_data": True}}]
        return json.dumps(body).encode()

    def grpc_message(self) -> bytes:
        """Return the serialized message."""
        request = service_pb2.ModelInferRequest(model_name=self.model, id=self.request_id)
        for name, value in self._parameters().items():
            request.parameters[name].int64_param = value
        for name, values in self._lists():
            kind, numpy_type = _TYPES[name]
            request.inputs.add(name=name, datatype=kind, shape=[len(values)])
            request.raw_input_contents.append(
                b"".join(len(text).to_bytes(4, "little") + text for text in (str(v).encode() for v in values))
                if kind == "BYTES"
                else np.array(values, numpy_type).tobytes()
            )
        if self.output:
            request.outputs.add(name=self.output)
        return bytes(request.SerializeToString())

    def _lists(self) -> list[tuple[str, list[Any]]]:
        return [(name, value if isinstance(value, list) else [value]) for name, value in self.inputs.items()]

    def _parameters(self) -> dict[str, int]:
        return {"timeout": self.timeout_us} if self.timeout_us else {}


@dataclass(frozen=True)
class Answer:
    """What a caller got.

    Attributes:
        outcome: OK, the tag of the server's sentence (`REFUSED` where it has none), LEFT or TIMED_OUT.
        sentence: The server's, where it refused.
        output: The bytes of the output that was asked for; with gRPC and HTTP the same.
    """

    outcome: str
    sentence: str = ""
    output: bytes = field(default=b"", repr=False)


class Caller(Protocol):
    """Sends requests; an asynchronous context manager. Cancelling `send` is a caller who leaves."""

    async def send(self, request: WireRequest, deadline_s: float | None = None) -> Answer:
        """Send a request and wait for its answer, at most until the deadline."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class HttpCaller:
    """Over HTTP/1.1.

    Args:
        address: `HOST:PORT`.
        keeps_connections: Whether connections are used again.
    """

    def __init__(self, address: str, *, keeps_connections: bool = True) -> None:
        self._client = httpx.AsyncClient(
            base_url=f"http://{address}/v2/models",
            limits=httpx.Limits(max_keepalive_connections=None if keeps_connections else 0),
            timeout=None,  # noqa: S113 - each request has its own deadline, or none
            trust_env=False,
            verify=_NO_TLS,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def send(self, request: WireRequest, deadline_s: float | None = None) -> Answer:
        """Send a request; past its deadline, its connection is closed."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self.post(f"/{request.model}/infer", request.http_body())
        except TimeoutError:
            return Answer(TIMED_OUT)

    async def post(self, path: str, body: bytes) -> Answer:
        """Send a body, whatever it is."""
        response = await self._client.post(path, content=body, headers={"content-type": "application/json"})
        if response.status_code == 200:
            json_length = response.headers.get(JSON_LENGTH)
            return Answer(OK, output=response.content[int(json_length) :] if json_length else response.content)
        return _refusal(response.text)


class RawHttpCaller:
    """Over HTTP/1.1 on connections that are kept, for a fifth of the processor time that httpx takes.

    It reads what this server sends, answers with a `Content-Length`, and nothing else.

    Args:
        address: `HOST:PORT`.
    """

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def send(self, request: WireRequest, deadline_s: float | None = None) -> Answer:
        """Send a request; past its deadline, its connection is closed."""
        try:
            async with asyncio.timeout(deadline_s):
                return await self._send(request)
        except TimeoutError:
            return Answer(TIMED_OUT)

    async def _send(self, request: WireRequest) -> Answer:
        body = request.http_body()
        lines = (
            f"POST /v2/models/{request.model}/infer HTTP/1.1",
            f"Host: {self._host}",
            f"Content-Length: {len(body)}",
        )
        head = "\r\n".join((*lines, "", ""))
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(head.encode() + body)
            status, headers = _read_head(await reader.readuntil(b"\r\n\r\n"))
            content = await reader.readexactly(int(headers["content-length"]))
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        if status != 200:
            return _refusal(content.decode(errors="replace"))
        return Answer(OK, output=content[int(headers[JSON_LENGTH]) :])


class GrpcCaller:
    """Over gRPC.

    Args:
        address: `HOST:PORT`.
        channels: How many connections are used in turns: a connection takes a bounded number of calls.
    """

    def __init__(self, address: str, channels: int = 1) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._channels = [grpc.aio.insecure_channel(f"ipv4:{address}", options=options) for _ in range(channels)]
        self._calls = [
            channel.unary_unary(INFER, response_deserializer=service_pb2.ModelInferResponse.FromString)
            for channel in self._channels
        ]
        self._turn = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))

    async def send(self, request: WireRequest, deadline_s: float | None = None) -> Answer:
        """Send a request with gRPC's own deadline."""
        self._turn += 1
        try:
            response = await self._calls[self._turn % len(self._calls)](request.grpc_message(), timeout=deadline_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return Answer(TIMED_OUT)
            return _refusal(error.details() or str(error.code()))
        return Answer(OK, output=response.raw_output_contents[0])


def _read_head(head: bytes) -> tuple[int, dict[str, str]]:
    """Return the status and the headers, whose names are in lower case."""
    first, *lines = head.decode("latin-1").rstrip().split("\r\n")
    pairs = (line.partition(": ") for line in lines)
    return int(first.split(" ")[1]), {name.lower(): value for name, _, value in pairs}


def _refusal(sentence: str) -> Answer:
    tag = _TAG.search(sentence)
    return Answer(tag[1] if tag else "REFUSED", sentence)


_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For httpx, which makes one otherwise for each client, in milliseconds."""
