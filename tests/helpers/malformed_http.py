"""Malformed HTTP requests: good ones, mutated at every level, the same for the same seed."""

# ruff: noqa: ARG005 - all mutations are called alike

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

# Each has three faults, so that what a mutation mends isn't computed.
FAULTS = {"scheduler": "none", "eta": 2.0, "guidance_scale": -1.0}
GENERATE: dict[str, Any] = {"prompt": "rain", "num_inference_steps": 1, "audio_length_in_s": 0.04, **FAULTS}
DATATYPES = {"prompt": "BYTES", "scheduler": "BYTES", "num_inference_steps": "INT32"}
INFER = {
    "inputs": [
        {"name": name, "datatype": DATATYPES.get(name, "FP32"), "shape": [1], "data": [value]}
        for name, value in GENERATE.items()
    ]
}
JOBS = {"request_id": "never seen"}
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 2**31, 2**63, 2**64, 10**400, 1.5, 1e308, -0.0, "", "x", "\0", "\ud800", "é🐕\r\n"),
    *("a" * 5000, [], [[]], [[[[]]]], {}, {"a": {"a": {}}}, [1] * 3000, ["x"] * 3000, {str(n): n for n in range(300)}),
)
ODD_NAMES = (
    *("id", "parameters", "timeout", "sequence_id", "priority", "binary_data_size", "classification", "outputs"),
    *(
        "shared_memory_region",
        "triton_x",
        "model_name",
        "model_version",
        "inputs",
        "shape",
        "datatype",
        "data",
        "",
        "\0",
    ),
)
ODD_PATHS = (
    *("/", "*", "//v2", "/v2/models/vae/infer", "/v2/repository/index", "/v2/systemsharedmemory/region/a/register"),
    *(
        "/v2/logging",
        "/v2/models/audioldm2/../unet/infer",
        "/v2/models/audioldm2%2f..%2funet/infer",
        "/v2/models/%00/infer",
    ),
    *("http://other/v2/trace/setting", "/v2/models/audioldm2/versions/99999999/infer", "/v2/health/live?" + "a" * 3000),
    *(
        "/v2/models/audioldm2\\..\\unet",
        "/v2/models/" + "a" * 3000,
        "/inference.GRPCInferenceService/ModelInfer",
        "/\xe9",
    ),
)
ODD_HEADERS = (
    *(
        "Content-Length: 5",
        "Content-Length: 5, 6",
        "Content-Length: +5",
        "Content-Length: -1",
        "Content-Length: 9" + "9" * 30,
    ),
    *(
        "Transfer-Encoding: chunked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: identity",
    ),
    *("Content-Encoding: gzip", "Content-Encoding: br, gzip", "Content-Type: application/grpc", "Content-Type: \xff"),
    *(
        "Expect: 100-continue",
        "Expect: nothing",
        "Connection: Upgrade\r\nUpgrade: h2c",
        "Upgrade: websocket",
        "X-A: b\r\n c",
    ),
    *(
        "Inference-Header-Content-Length: -1",
        "Inference-Header-Content-Length: 7",
        "inference-header-content-length: 1" + "0" * 30,
    ),
    *("X-Request-Id: a\x01b", "X-Request-Id: \xe9", "X-Request-Id: " + "a" * 9000, "x-envoy-upstream-rq-timeout-ms: 1"),
    *(
        "x-envoy-max-retries: 99\r\nx-envoy-retry-on: 5xx",
        "x-envoy-original-path: /v2/logging",
        "x-forwarded-for: 1.1.1.1",
    ),
    *(
        "Host: b",
        "a_b: c",
        ": c",
        "\0: c",
        "no colon",
        "X-A: " + "a" * 40_000,
        "\r\n".join(f"X-{n}: 1" for n in range(99)),
    ),
)


def http_messages(number: int, seed: int) -> Iterator[bytes]:
    """Make that many requests, one after the other, as bytes for a connection of its own each."""
    for index in range(number):
        yield _message(random.Random(f"{seed} {index}"))


def _message(rng: random.Random) -> bytes:
    value, path = rng.choice(
        [
            (GENERATE, "/v2/models/audioldm2/generate"),
            (INFER, "/v2/models/audioldm2/infer"),
            (JOBS, "/v2/models/jobs/generate"),
        ]
    )
    body = json.dumps(_mutated_value(rng, value) if rng.random() < 0.6 else value).encode()
    if rng.random() < 0.3:
        body = rng.choice(BODY_MUTATIONS)(rng, body)
    method = rng.choice(["POST"] * 12 + ["GET", "PUT", "HEAD", "OPTIONS", "CONNECT", "TRACE", "post", "P\0ST"])
    path = rng.choice(ODD_PATHS) if rng.random() < 0.15 else path
    version = rng.choice(["1.1"] * 20 + ["1.0", "0.9", "2.0", "9.9", ""])
    headers = ["Host: a", "Connection: close", *rng.sample(ODD_HEADERS, rng.choice([0, 0, 0, 1, 1, 2]))]
    message = _framed(rng, f"{method} {path} HTTP/{version}", headers, body)
    return rng.choice(MESSAGE_MUTATIONS)(rng, message) if rng.random() < 0.15 else message


def _framed(rng: random.Random, first: str, headers: list[str], body: bytes) -> bytes:
    content = body
    if rng.random() < 0.2:
        extension, size = rng.choice(["", ";a=b", ";" + "a" * 2000, " "]), rng.choice([1, 7, 1000])
        chunks = [body[start : start + size] for start in range(0, len(body), size)]
        content = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), extension.encode(), chunk) for chunk in chunks)
        content += rng.choice(
            [b"0\r\n\r\n", b"0\r\nX-A: b\r\n\r\n", b"0\r\nContent-Length: 5\r\n\r\n", b"-1\r\n", b"f" * 20]
        )
        headers = [*headers, "Transfer-Encoding: chunked"]
    else:
        headers = [*headers, f"Content-Length: {len(body)}"]
    rng.shuffle(headers)
    return "\r\n".join([first, *headers, "", ""]).encode("latin-1", "replace") + content


def _mutated_value(rng: random.Random, value: Any) -> Any:
    """Return a value in which something is replaced, doubled, renamed, left out or added."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(ODD_VALUES)
    if isinstance(value, list):
        items = list(value)
        index = rng.randrange(len(items))
        items[index : index + 1] = rng.choice(
            [[_mutated_value(rng, items[index])], [], items * 2, [items[index]] * 200]
        )
        return items
    fields = dict(value)
    name = rng.choice(list(fields))
    match rng.randrange(4):
        case 0:
            del fields[name]
        case 1:
            fields[rng.choice(ODD_NAMES)] = rng.choice(ODD_VALUES)
        case 2:
            fields["parameters"] = {rng.choice(ODD_NAMES): rng.choice(ODD_VALUES)}
        case _:
            fields[name] = _mutated_value(rng, fields[name])
    return fields


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 3, 20])):
        if changed:
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


Mutation = Callable[[random.Random, bytes], bytes]
BODY_MUTATIONS: list[Mutation] = [
    _flip,
    _cut,
    lambda rng, body: body[:1] + b'"prompt":"twice",' + body[1:],
    lambda rng, body: body.decode().encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])),
    lambda rng, body: b'{"prompt":' + b"[" * (n := rng.choice([17, 999, 60_000])) + b"]" * n + b"}",
    lambda rng, body: b'{"prompt":' + b"9" * rng.choice([400, 5000, 100_000]) + b"}",
    lambda rng, body: body + rng.choice([b"\0", b"{}", b"x" * 70_000, b" " * 300_000]),
    lambda rng, body: rng.choice([b"", b"null", b"[]", b"1", b"NaN", b"\x1f\x8b\x08", b"\xff\xfe", rng.randbytes(500)]),
    lambda rng, body: b'{"a":' * 300 + b"1" + b"}" * 300,
]
MESSAGE_MUTATIONS: list[Mutation] = [
    _flip,
    _flip,
    _cut,
    lambda rng, message: message.replace(b"\r\n", b"\n"),
    lambda rng, message: message * 20,
    lambda rng, message: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(200),
    lambda rng, message: b"\x16\x03\x01" + rng.randbytes(200),
]
