"""The KServe v2 inference protocol over HTTP, with Triton's binary tensors. Pure: shared by blocking and asyncio I/O.

https://github.com/kserve/open-inference-protocol and Triton's docs/protocol/extension_binary_data.md. The gRPC form of
the same tensors is in `_kserve_grpc`.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from audioldm2_client._request import InferenceRequest, InputTensor

HEADER_LENGTH = "inference-header-content-length"
"""The HTTP header that tells how much of a body is JSON; the tensors follow it."""

_DTYPES = {
    "BOOL": "?",
    **{
        f"{prefix}INT{bits}": f"<{kind}{bits // 8}"
        for prefix, kind in (("", "i"), ("U", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"FP{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
}
_LENGTH = np.dtype("<u4")

Outputs = dict[str, npt.NDArray[Any]]


class ProtocolError(ValueError):
    """An answer doesn't follow the protocol: it isn't Triton's, or was changed on its way."""


def encode_tensor(tensor: InputTensor) -> bytes:
    """Return the elements as they are sent: little endian, in C order; a text after its length."""
    if tensor.datatype == "BYTES":
        return b"".join(np.array(len(item), _LENGTH).tobytes() + item for item in tensor.data)
    return tensor.data.astype(_DTYPES[tensor.datatype], copy=False).tobytes()


def decode_tensor(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> npt.NDArray[Any]:
    """Return a tensor, a read-only view of `data` except for BYTES, which become `bytes` objects.

    Raises:
        ProtocolError: an unknown type, or more or fewer bytes than the shape needs.
    """
    try:
        if datatype == "BYTES":
            return np.array(_split_texts(data), np.object_).reshape(shape)
        return np.frombuffer(data, _DTYPES[datatype]).reshape(shape)
    except (KeyError, ValueError, TypeError) as error:
        raise ProtocolError(f"output {name!r} has {len(data)} bytes, which is no {datatype} {list(shape)}") from error


def _split_texts(data: bytes | memoryview) -> list[bytes]:
    texts, position = [], 0
    while position < len(data):
        (length,) = np.frombuffer(data, _LENGTH, 1, position)
        position += _LENGTH.itemsize + int(length)
        if position > len(data):
            raise ValueError("a text is cut off")
        texts.append(bytes(data[position - int(length) : position]))
    return texts


def infer_path(model_name: str) -> str:
    """Return the path of inference."""
    return f"/v2/models/{quote(model_name, safe='')}/infer"


SERVER_READY_PATH = "/v2/health/ready"
"""The path of the server's readiness: that of all its models and, from Triton 2.70 on, of the processes behind them."""


def ready_path(model_name: str) -> str:
    """Return the path of a model's readiness."""
    return f"/v2/models/{quote(model_name, safe='')}/ready"


def build_body(request: InferenceRequest) -> tuple[bytes, dict[str, str]]:
    """Return the body of an inference and the headers that describe it."""
    tensors = [encode_tensor(tensor) for tensor in request.inputs]
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.data.shape,
            "parameters": {"binary_data_size": len(data)},
        }
        for tensor, data in zip(request.inputs, tensors, strict=True)
    ]
    # The time tells the server when nobody waits any more; it isn't told when an HTTP connection closes.
    parameters = {"timeout": request.timeout_us, "binary_data_output": True}
    header = json.dumps({"id": request.id, "parameters": parameters, "inputs": inputs}).encode()
    headers = {"content-type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return b"".join((header, *tensors)), headers


def parse_body(body: bytes, headers: Mapping[str, str]) -> Outputs:
    """Return the outputs in the body of a good answer.

    Raises:
        ProtocolError: it is none.
    """
    try:
        header_length = int(headers.get(HEADER_LENGTH, len(body)))
        if not 0 <= header_length <= len(body):
            raise ValueError(f"its JSON is to have {header_length} of {len(body)} bytes")
        listed = json.loads(body[:header_length])["outputs"]
        described = [(str(o["name"]), o["datatype"], o["shape"], o["parameters"]["binary_data_size"]) for o in listed]
        sizes = [size for *_, size in described]
        if sum(sizes) != len(body) - header_length or min(sizes, default=0) < 0:
            raise ValueError(f"its tensors are to have {sum(sizes)} of {len(body) - header_length} bytes")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProtocolError(f"{type(error).__name__}: {error}") from error
    outputs, rest = {}, memoryview(body)[header_length:]
    for name, datatype, shape, size in described:
        outputs[name], rest = decode_tensor(name, datatype, shape, rest[:size]), rest[size:]
    return outputs


def parse_error(body: bytes) -> str | None:
    """Return the words of Triton's error; None where the body isn't of its form."""
    try:
        words = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return words if isinstance(words, str) else None
