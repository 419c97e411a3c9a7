"""What the headers of weight files say about their sizes: no weight is read, and nothing large is allocated."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_SAFETENSORS_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""

_LFS_POINTER = b"version https://git-lfs"

# Field numbers of ONNX's protobuf messages (onnx.proto).
_GRAPH, _OPSET_IMPORT = 7, 8  # ModelProto
_INITIALIZER = 5  # GraphProto
_EXTERNAL_DATA = 13  # TensorProto
_KEY, _VALUE = 1, 2  # StringStringEntryProto

_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5  # wire types of protobuf


class _HeaderError(Exception):
    """The text completes "model.onnx ..."."""


def weights_problem(path: Path) -> str:
    """Return what is wrong with a file of weights as far as headers and sizes tell; an empty string for nothing.

    Args:
        path: A regular file, `.onnx` or `.safetensors`; others have no header that is known here.

    Returns:
        The rest of a sentence that begins with the file's name, such as "is truncated".

    Raises:
        OSError: The file can't be read.
    """
    check = {".onnx": _check_onnx, ".safetensors": _check_safetensors}.get(path.suffix)
    if check is None:
        return ""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                return "is empty"
            if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                return "is a pointer of Git LFS and not the file itself (`git lfs pull` gets that)"
            file.seek(0)
            check(file, size, path.parent)
    except _HeaderError as error:
        return str(error)
    return ""


def _check_safetensors(file: BinaryIO, size: int, _folder: Path) -> None:
    """Compare the file's size with where its header says that the last tensor ends."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 0 < length <= min(size - 8, MAX_SAFETENSORS_HEADER) or file.read(1) != b"{":
        raise _HeaderError(f"is truncated or isn't a safetensors file ({size:,} bytes, a header of {length:,})")
    file.seek(8)
    try:
        tensors = json.loads(file.read(length))
        ends = [_whole(tensor["data_offsets"][1]) for name, tensor in tensors.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _HeaderError("has a damaged header") from error
    if size != (expected := 8 + length + max(ends, default=0)):
        raise _HeaderError(f"has {size:,} bytes, and its header says {expected:,}")


def _whole(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(value)
    return value


def _check_onnx(file: BinaryIO, size: int, folder: Path) -> None:
    """Walk over the model's and the graph's fields, and compare external data with the sizes of its files."""
    found = set()
    needed: dict[str, int] = {}
    for number, start, end in _fields(file, 0, size):
        found.add(number)
        if number == _GRAPH:
            for initializer in _submessages(file, start, end, _INITIALIZER):
                _add_external_data(file, *initializer, needed)
    if not {_GRAPH, _OPSET_IMPORT} <= found:
        raise _HeaderError("is truncated or isn't an ONNX model")
    for name, expected in needed.items():
        _check_external_file(folder, name, expected)


def _check_external_file(folder: Path, name: str, expected: int) -> None:
    try:
        size = (folder / name).stat().st_size
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            raise
        raise _HeaderError(f"needs {name} beside it, which is missing") from error
    if size < expected:
        raise _HeaderError(f"needs {expected:,} bytes of {name}, which has {size:,}")


def _add_external_data(file: BinaryIO, start: int, end: int, needed: dict[str, int]) -> None:
    """Add to `needed` up to which byte a tensor uses which file, if its weights aren't in the model itself."""
    entries = {}
    for place in _submessages(file, start, end, _EXTERNAL_DATA):
        pair = {number: _text(file, *span) for number, *span in _fields(file, *place) if number in (_KEY, _VALUE)}
        entries[pair.get(_KEY, "")] = pair.get(_VALUE, "")
    if "location" in entries:
        try:
            last = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        except ValueError as error:
            raise _HeaderError("has a damaged reference to its external data") from error
        needed[entries["location"]] = max(last, needed.get(entries["location"], 0))


def _text(file: BinaryIO, start: int, end: int) -> str:
    file.seek(start)
    return file.read(min(end - start, 4096)).decode(errors="replace")


def _submessages(file: BinaryIO, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
    return ((first, last) for number, first, last in _fields(file, start, end) if number == wanted)


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Give number, start and end of each field of the protobuf message that is at `start` to `end` of a file."""
    position = start
    while position < end:
        file.seek(position)
        tag = _read_varint(file)
        number, wire_type = tag >> 3, tag & 7
        if number == 0 or wire_type not in (_VARINT, _FIXED_64, _BYTES, _FIXED_32):
            raise _HeaderError("is damaged or isn't an ONNX model")
        if wire_type == _VARINT:
            _read_varint(file)
        length = {_FIXED_64: 8, _FIXED_32: 4}.get(wire_type, 0) if wire_type != _BYTES else _read_varint(file)
        first = file.tell()
        position = first + length
        if position > end:
            raise _HeaderError(
                f"is truncated: it has {end:,} bytes and needs {position:,}" if not start else "is damaged"
            )
        yield number, first, position


def _read_varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise _HeaderError("is truncated")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise _HeaderError("is damaged or isn't an ONNX model")
