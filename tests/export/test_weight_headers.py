"""The headers of weight files tell a wrong size, without a manifest and without reading the weights."""

import json
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from export.weight_headers import weights_problem

WEIGHTS = np.arange(3000, dtype=np.float32)


def external_model(path: Path) -> Path:
    """Write an ONNX model with two tensors in `model.onnx.data`."""
    tensors = [numpy_helper.from_array(WEIGHTS, name) for name in ("a", "b")]
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(WEIGHTS)])
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["y"])], "sum", [], [value], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def inline_model(path: Path) -> Path:
    onnx.save(onnx.load(external_model(path)), path)
    path.with_name("model.onnx.data").unlink()
    return path


def safetensors(path: Path) -> Path:
    save_file({"a": WEIGHTS, "b": WEIGHTS[:7]}, path)
    return path


def write_header(path: Path, length: int, header: bytes, size: int = 0) -> Path:
    """Write a safetensors file that says that its header has `length` bytes; up to `size` it is a hole."""
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length) + header)
        file.truncate(max(size, 8 + len(header)))
    return path


def header(*data_offsets: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": data_offsets}}).encode()


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
def test_every_truncation_is_seen(tmp_path, name):
    path = (inline_model if name == "model.onnx" else safetensors)(tmp_path / name)
    content = path.read_bytes()
    assert weights_problem(path) == ""
    for size in {*range(200), *range(0, len(content), 97), *range(len(content) - 40, len(content))}:
        path.write_bytes(content[:size])
        assert weights_problem(path), f"{size} of {len(content)} bytes"


def test_a_safetensors_file_that_is_too_long_is_seen(tmp_path):
    path = safetensors(tmp_path / "weights.safetensors")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"\0")
    assert weights_problem(path) == f"has {size + 1:,} bytes, and its header says {size:,}"


def test_external_data_is_compared_with_what_the_graph_uses(tmp_path):
    path = external_model(tmp_path / "model.onnx")
    data = tmp_path / "model.onnx.data"
    used = data.stat().st_size
    assert weights_problem(path) == ""
    data.write_bytes(data.read_bytes()[:-1])
    assert weights_problem(path) == f"needs {used:,} bytes of model.onnx.data, which has {used - 1:,}"
    data.unlink()
    assert weights_problem(path) == "needs model.onnx.data beside it, which is missing"


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors"])
@pytest.mark.parametrize(
    "content",
    [
        b"\0" * 5000,
        b"\xff" * 5000,
        b"{}",
        b"<html>502 Bad Gateway</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n",
        bytes(range(256)) * 20,
        b"\x80" * 30,
    ],
    ids=["zeros", "ones", "json", "html", "lfs", "bytes", "varint"],
)
def test_what_is_no_file_of_weights_is_seen(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert weights_problem(tmp_path / name)


@pytest.mark.parametrize("kind", [inline_model, safetensors])
def test_the_other_kind_of_file_is_seen(tmp_path, kind):
    path = kind(tmp_path / "file")
    for suffix in (".onnx", ".safetensors"):
        renamed = path.rename(tmp_path / f"file{suffix}")
        assert bool(weights_problem(renamed)) == (suffix != (".onnx" if kind is inline_model else ".safetensors"))
        path = renamed


@pytest.mark.parametrize(
    ("length", "text", "size"),
    [
        (2**63, header(0, 4), 0),
        (2**64 - 1, b"{", 0),
        (5_000_000_000, b"{", 6_000_000_000),
        (99_000_000, b"", 6_000_000_000),
        (len(header(0, 2**70)), header(0, 2**70), 0),
        (len(header(0, -4)), header(0, -4), 0),
        (len(header(0, "4")), header(0, "4"), 0),
        (len(header(0)), header(0), 0),
        (40, b"[" * 40, 0),
        (20_000, b'{"a":' * 4_000, 0),
        (2, b"[]", 0),
        (7, b'{"a":1}', 0),
        (4, b'{"\xff"', 0),
        (0, b"", 0),
    ],
)
def test_a_header_that_lies_is_seen_and_nothing_large_is_allocated(tmp_path, length, text, size):
    path = write_header(tmp_path / "weights.safetensors", length, text, size)
    tracemalloc.start()
    try:
        assert weights_problem(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


def test_gigabytes_of_weights_take_no_time(tmp_path):
    """Of 6 GB, which are a hole, a few kilobytes are read."""
    size = 6_000_000_000
    text = header(0, size)
    path = write_header(tmp_path / "weights.safetensors", len(text), text, 8 + len(text) + size)
    onnx_file = tmp_path / "model.onnx"
    content = inline_model(onnx_file).read_bytes()
    field = bytes([0xA2, 1])  # field 20, which ONNX has not: as many bytes as its length says
    length = b"".join(bytes([(size >> shift) & 0x7F | 0x80 * (shift < 28)]) for shift in range(0, 35, 7))
    with onnx_file.open("wb") as file:
        file.write(content + field + length)
        file.truncate(file.tell() + size)
    started = time.monotonic()
    assert (weights_problem(path), weights_problem(onnx_file)) == ("", "")
    assert time.monotonic() - started < 1
