"""Malformed gRPC calls: good ones, mutated from the message to HTTP/2's frames, the same for the same seed."""

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2

SERVICE = "/inference.GRPCInferenceService/"
METHODS = (
    *(
        f"{SERVICE}{name}"
        for name in ("ModelInfer", "ModelReady", "ModelMetadata", "ServerLive", "ServerReady", "ModelConfig")
    ),
    *(
        f"{SERVICE}{name}"
        for name in ("ModelStreamInfer", "RepositoryIndex", "SystemSharedMemoryRegister", "LogSettings", "")
    ),
    *("/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/a/b", "/", "/v2/health/live"),
)
ODD_TEXTS = ("", "x", "\0", "a\r\nb", "é🐕", "vae", "audioldm2/../vae", "-1", "0", "9" * 30, "a" * 1024, "a" * 50_000)
ODD_NUMBERS = (0, -1, 2**31, 2**63 - 1, -(2**63))
PARAMETERS = (
    *("timeout", "priority", "sequence_id", "sequence_start", "binary_data_output", "classification", "headers"),
    *("shared_memory_region", "shared_memory_byte_size", "triton_enable_empty_final_response", "triton_x", ""),
)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4


@dataclass(frozen=True)
class Call:
    """A unary call.

    Attributes:
        method: Its path.
        message: Bytes that should be a protobuf message.
        metadata: More of its headers.
    """

    method: str
    message: bytes
    metadata: tuple[tuple[str, str], ...]


def good_request() -> Any:
    """Return a ModelInferRequest that has three faults, so that what a mutation mends isn't computed."""
    request = service_pb2.ModelInferRequest(model_name="audioldm2")
    for name, datatype, field, value in (
        ("num_inference_steps", "INT32", "int_contents", 1),
        ("audio_length_in_s", "FP32", "fp32_contents", 0.04),
        ("scheduler", "BYTES", "bytes_contents", b"none"),
        ("eta", "FP32", "fp32_contents", 2.0),
        ("guidance_scale", "FP32", "fp32_contents", -1.0),
        ("prompt", "BYTES", "bytes_contents", b"rain"),
    ):
        tensor = request.inputs.add(name=name, datatype=datatype, shape=[1])
        getattr(tensor.contents, field).append(value)
    return request


def grpc_calls(number: int, seed: int) -> Iterator[Call]:
    """Make that many calls whose frames are right."""
    for index in range(number):
        rng = random.Random(f"{seed} {index}")
        method = METHODS[0] if rng.random() < 0.7 else rng.choice(METHODS)
        metadata = rng.choice(
            [(), (), (("x-request-id", "a b"),), (("grpc-encoding", "gzip"),), (("x-envoy-max-retries", "9"),)]
        )
        yield Call(method, _message(rng), metadata)


def frame_sequences(number: int, seed: int) -> Iterator[bytes]:
    """Make that many sequences of HTTP/2 frames, each for a connection of its own."""
    for index in range(number):
        rng = random.Random(f"{seed} {index}")
        yield (
            PREFACE
            + frame(SETTINGS)
            + b"".join(_frames(rng, 2 * stream + 1) for stream in range(rng.choice([1, 1, 3])))
        )


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """Return one frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(headers: list[tuple[str, str]]) -> bytes:
    """Return headers as HPACK literals."""
    return b"".join(b"\x00" + _hpack(name) + _hpack(value) for name, value in headers)


def call_headers(method: str = METHODS[0]) -> list[tuple[str, str]]:
    """Return the headers of a call."""
    return [
        *((":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "a")),
        *(("content-type", "application/grpc"), ("te", "trailers")),
    ]


def prefixed(message: bytes) -> bytes:
    """Return a message behind gRPC's prefix."""
    return struct.pack(">?I", False, len(message)) + message


def _hpack(text: str) -> bytes:
    content = text.encode("latin-1", "replace")
    if len(content) < 127:
        return bytes([len(content)]) + content
    rest, size = len(content) - 127, bytearray(b"\x7f")
    while rest >= 128:
        size.append(rest % 128 + 128)
        rest //= 128
    return bytes(size) + bytes([rest]) + content


def _message(rng: random.Random) -> bytes:
    request = good_request()
    for _ in range(rng.choice([1, 1, 2, 3])):
        _mutate(rng, request)
    message = bytearray(request.SerializeToString())
    match rng.randrange(10):
        case 0:
            for _ in range(rng.choice([1, 3, 20])):
                message[rng.randrange(len(message))] = rng.randrange(256)
        case 1:
            del message[rng.randrange(len(message)) :]
        case 2:
            message += b"\xfb\x7f" * (depth := rng.choice([1, 90, 20_000])) + b"\xfc\x7f" * depth  # groups
        case 3:
            message += rng.choice(
                [b"\x0a\x03vae", b"\x08\x01", b"\xfa\x7f\x03abc", b"\x0a\xff\xff\xff\xff\x0f", b"\x80" * 30]
            )
        case 4:
            message = bytearray(rng.randbytes(rng.choice([0, 1, 100, 5000])))
    return bytes(message)


def _mutate(rng: random.Random, request: Any) -> None:
    rng.choice([_mutate_tensor, _mutate_request, _multiply])(rng, request)


def _mutate_tensor(rng: random.Random, request: Any) -> None:
    tensor = rng.choice(request.inputs)
    match rng.randrange(4):
        case 0:
            tensor.name = rng.choice(ODD_TEXTS)
        case 1:
            tensor.datatype = rng.choice([*ODD_TEXTS, "INT8", "FP16", "BOOL", "BYTES"])
        case 2:
            del tensor.shape[:]
            tensor.shape.extend(rng.choices([1, *ODD_NUMBERS], k=rng.choice([0, 1, 2, 4, 9, 100])))
        case _:
            request.inputs.remove(tensor)


def _mutate_request(rng: random.Random, request: Any) -> None:
    match rng.randrange(4):
        case 0:
            request.id = rng.choice(ODD_TEXTS)
        case 1:
            request.model_version = rng.choice(ODD_TEXTS)
        case 2:
            request.model_name = rng.choice(["audioldm2_cached", "jobs", *ODD_TEXTS])
        case _:
            parameter = rng.choice([request, *request.inputs]).parameters[rng.choice(PARAMETERS)]
            field, values = rng.choice(
                [("int64_param", ODD_NUMBERS), ("string_param", ODD_TEXTS), ("bool_param", (True, False))]
            )
            setattr(parameter, field, rng.choice(values))


def _multiply(rng: random.Random, request: Any) -> None:
    tensor, many = rng.choice(request.inputs), rng.choice([1, 5, 300])
    match rng.randrange(4):
        case 0:
            tensor.contents.fp32_contents.extend([1.0] * many)
        case 1:
            request.raw_input_contents.extend([rng.choice([b"", b"\xff" * 4, b"\x04\0\0\0rain", bytes(3000)])] * many)
        case 2:
            request.inputs.extend([tensor] * many)
        case _:
            for _ in range(many):
                output = request.outputs.add(name=rng.choice(["audio", "job_ticket", *ODD_TEXTS]))
                output.parameters["classification"].int64_param = rng.choice(ODD_NUMBERS)


def _frames(rng: random.Random, stream: int) -> bytes:
    headers, body = call_headers(rng.choice(METHODS)), prefixed(good_request().SerializeToString())
    if rng.random() < 0.4:
        extra = [("te", "x"), (":path", "/"), ("Upper", "a"), ("content-length", "7"), ("a", "b" * 40_000), ("", "")]
        headers.insert(rng.randrange(len(headers) + 1), rng.choice([*extra, ("transfer-encoding", "chunked")]))
    if rng.random() < 0.2:
        del headers[rng.randrange(len(headers))]
    block = header_block(headers)
    opened = frame(HEADERS, END_HEADERS, stream, block)
    data = frame(DATA, END_STREAM, stream, body)
    odd = rng.choice([DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION, 99])
    return rng.choice(
        [
            opened + data,
            frame(HEADERS, END_HEADERS | END_STREAM, stream, block),  # no message
            opened + frame(DATA, END_STREAM, stream),
            opened
            + frame(DATA, END_STREAM, stream, rng.choice([b"\x01", b"\x02", b"\0\xff\xff\xff\xff", b"\0"]) + body),
            opened + frame(DATA, END_STREAM, stream, body * 2),
            opened + frame(DATA, END_STREAM, stream, body[:-1]),
            opened + frame(DATA, 0, stream) * 300 + data,
            opened + data + frame(RST_STREAM, 0, stream, bytes(4)),
            opened
            + frame(DATA, 0, stream, body)
            + frame(HEADERS, END_HEADERS | END_STREAM, stream, header_block([("a", "b")])),
            opened
            + frame(
                odd, rng.randrange(256), rng.choice([0, stream, 2, 2**31 - 1]), rng.randbytes(rng.choice([0, 4, 8]))
            ),
            frame(HEADERS, 0, stream, block) + frame(CONTINUATION, 0, stream, header_block([("a", "b")])) * 100,
            opened[: rng.randrange(len(opened))] + data,
            opened + data[: rng.randrange(len(data))],
            frame(HEADERS, END_HEADERS, stream, rng.randbytes(100)),
        ]
    )
