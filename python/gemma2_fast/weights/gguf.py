"""GGUF files (versions 2 and 3, little-endian): metadata and memory-mapped tensors, every size checked before use."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import FileFormatError
from gemma2_fast.quant import FORMAT_BY_GGUF_TYPE, Format
from gemma2_fast.weights.mapped_file import map_file
from gemma2_fast.weights.messages import listed, quoted
from gemma2_fast.weights.tensor import Tensor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_DIMENSIONS = 4
# Far above any model (a 62-layer one has 808 tensors and 40 keys, the largest vocabulary 262,208 entries). They bound
# what a hostile file can make the reader allocate beyond a small multiple of its own size.
MAX_TENSORS = 1 << 16
MAX_KEYS = 1 << 16
MAX_NAME_BYTES = 1 << 16
MAX_STRINGS = 1 << 22

_SCALAR_FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_SCALARS = {type_id: struct.Struct(code) for type_id, code in _SCALAR_FORMATS.items()}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufFile:
    """Metadata in file order (numbers, bool, str; arrays of text as list[str], all others as numpy arrays), and the
    tensors by name, views of the mapped bytes."""

    version: int
    metadata: dict[str, object]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Entry:
    """One tensor of the header; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    format: Format
    offset: int
    num_bytes: int


class _Cursor:
    """Reads the header front to back and never past the end of the file."""

    def __init__(self, path: Path, content: NDArray[np.uint8]) -> None:
        self.path = path
        self.content = content.data
        self.position = 0

    @property
    def bytes_left(self) -> int:
        return self.content.nbytes - self.position

    def fail(self, what: str) -> FileFormatError:
        return FileFormatError(f"{self.path}: {what}")

    def take(self, num_bytes: int, what: str) -> memoryview:
        if num_bytes > self.bytes_left:
            raise self.fail(
                f"{what} takes {num_bytes} bytes and {self.bytes_left} are left at byte {self.position}: "
                "the file is truncated or damaged; fetch it again"
            )
        self.position += num_bytes
        return self.content[self.position - num_bytes : self.position]

    def number(self, layout: struct.Struct, what: str) -> int:
        return int(layout.unpack(self.take(layout.size, what))[0])

    def text(self, what: str, max_bytes: int | None = None) -> str:
        length = self.number(_U64, f"the length of {what}")
        if max_bytes is not None and length > max_bytes:
            raise self.fail(f"{what} claims {length} bytes; at most {max_bytes} are allowed")
        return self.decoded(self.take(length, what), what)

    def decoded(self, raw: memoryview, what: str) -> str:
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8: {error.reason} at its byte {error.start}") from None


def read_gguf(path: str | os.PathLike[str]) -> GgufFile:
    """Map a GGUF file; FileFormatError where any count, size, type or offset in it cannot be true."""
    path = Path(path)
    content = map_file(path, "GGUF")
    cursor = _Cursor(path, content)
    version = _version(cursor)
    num_tensors = _count(cursor, "tensors", MAX_TENSORS)
    num_keys = _count(cursor, "metadata keys", MAX_KEYS)
    metadata = _metadata(cursor, num_keys)
    _refuse_split(cursor, metadata)
    alignment = _alignment(cursor, metadata)
    entries = _entries(cursor, num_tensors, alignment)
    data = content[-(-cursor.position // alignment) * alignment :]
    _check_layout(cursor, entries, data.nbytes)
    tensors = {e.name: Tensor(e.shape, e.format, data[e.offset : e.offset + e.num_bytes]) for e in entries}
    return GgufFile(version, metadata, tensors)


def _version(cursor: _Cursor) -> int:
    magic = bytes(cursor.take(len(MAGIC), "the magic number"))
    if magic != MAGIC:
        raise cursor.fail(f"not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}")
    version = cursor.number(_U32, "the version")
    if version in VERSIONS:
        return version
    if int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        raise cursor.fail("a big-endian GGUF file; convert it to little-endian")
    raise cursor.fail(
        f"GGUF version {version}; supported are {' and '.join(map(str, VERSIONS))}"
        + (": convert the model again with a current converter" if version < VERSIONS[0] else "")
    )


def _count(cursor: _Cursor, what: str, limit: int) -> int:
    count = cursor.number(_U64, f"the number of {what}")
    if count > limit:
        raise cursor.fail(f"it claims {count} {what}; at most {limit} are allowed")
    return count


def _metadata(cursor: _Cursor, num_keys: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for index in range(num_keys):
        key = cursor.text(f"metadata key {index}", MAX_NAME_BYTES)
        if key in metadata:
            raise cursor.fail(f"the metadata key {quoted(key)} stands there twice")
        what = f"metadata {quoted(key)}"
        metadata[key] = _value(cursor, cursor.number(_U32, f"the type of {what}"), what)
    return metadata


def _value(cursor: _Cursor, type_id: int, what: str) -> object:
    if type_id == _STRING:
        return cursor.text(what)
    if type_id == _ARRAY:
        return _array(cursor, what)
    layout = _SCALARS.get(type_id)
    if layout is None:
        raise cursor.fail(f"{what} has the unknown value type {type_id}")
    value: int | float = layout.unpack(cursor.take(layout.size, what))[0]
    if type_id != _BOOL:
        return value
    if value > 1:
        raise cursor.fail(f"{what} is a bool stored as {value}; expected 0 or 1")
    return bool(value)


def _array(cursor: _Cursor, what: str) -> list[str] | NDArray[np.generic]:
    type_id = cursor.number(_U32, f"the element type of {what}")
    count = cursor.number(_U64, f"the length of {what}")
    if type_id == _STRING:
        return _strings(cursor, count, what)
    if type_id == _ARRAY:
        raise cursor.fail(f"{what} is an array of arrays, which no model needs")
    layout = _SCALARS.get(type_id)
    if layout is None:
        raise cursor.fail(f"{what} is an array of the unknown value type {type_id}")
    stored = np.frombuffer(cursor.take(count * layout.size, what), dtype=np.dtype(_SCALAR_FORMATS[type_id]))
    if type_id == _BOOL:
        if stored.size and stored.max() > 1:
            raise cursor.fail(f"{what} holds a bool stored as {stored.max()}; expected 0 or 1")
        return stored.astype(np.bool_)
    return stored.astype(stored.dtype.newbyteorder("="))


def _strings(cursor: _Cursor, count: int, what: str) -> list[str]:
    if count > MAX_STRINGS or count * _U64.size > cursor.bytes_left:
        raise cursor.fail(
            f"{what} claims {count} strings; {cursor.bytes_left} bytes are left and at most {MAX_STRINGS} are allowed"
        )
    # A vocabulary has 262,144 of them: this loop, without the cursor's calls, parses it more than twice as fast.
    content, position = cursor.content, cursor.position
    length_at = _U64.unpack_from
    last_start = content.nbytes - _U64.size
    texts = []
    for _ in range(count):
        if position > last_start:
            break
        start = position + _U64.size
        position = start + length_at(content, position)[0]
        if position > content.nbytes:
            break
        try:
            texts.append(str(content[start:position], "utf-8"))
        except UnicodeDecodeError as error:
            raise cursor.fail(
                f"entry {len(texts)} of {what} is not UTF-8: {error.reason} at its byte {error.start}"
            ) from None
    if len(texts) < count:
        raise cursor.fail(f"entry {len(texts)} of {what} runs past the end: the file is truncated or damaged")
    cursor.position = position
    return texts


def _refuse_split(cursor: _Cursor, metadata: dict[str, object]) -> None:
    parts = metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        raise cursor.fail(f"one of {parts} parts of a split model; merge them first (llama-gguf-split --merge)")


def _alignment(cursor: _Cursor, metadata: dict[str, object]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    # A power of two: its only set bit is gone from the number below it.
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.fail(
            f"general.alignment must be a power of two from 1 to {MAX_ALIGNMENT}, got {quoted(alignment)}"
        )
    return alignment


def _entries(cursor: _Cursor, num_tensors: int, alignment: int) -> list[_Entry]:
    entries: dict[str, _Entry] = {}
    unsupported = []
    for index in range(num_tensors):
        name = cursor.text(f"the name of tensor {index}", MAX_NAME_BYTES)
        if name in entries:
            raise cursor.fail(f"tensor {quoted(name)} stands there twice")
        shape = _shape(cursor, name)
        type_id = cursor.number(_U32, f"the type of tensor {quoted(name)}")
        offset = cursor.number(_U64, f"the offset of tensor {quoted(name)}")
        if offset % alignment:
            raise cursor.fail(f"tensor {quoted(name)} starts at {offset}, not a multiple of the alignment {alignment}")
        format = FORMAT_BY_GGUF_TYPE.get(type_id)
        if format is None:
            unsupported.append(f"{quoted(name)} (type {type_id})")
            continue
        try:
            row_bytes = format.row_bytes(shape[-1])
        except FileFormatError as error:
            raise cursor.fail(f"tensor {quoted(name)}: {error}") from None
        entries[name] = _Entry(name, shape, format, offset, math.prod(shape[:-1]) * row_bytes)
    if unsupported:
        supported = ", ".join(f"{format.name} ({type_id})" for type_id, format in FORMAT_BY_GGUF_TYPE.items())
        raise cursor.fail(f"tensors of unsupported types: {listed(unsupported)}; supported are {supported}")
    return list(entries.values())


def _shape(cursor: _Cursor, name: str) -> tuple[int, ...]:
    """Slowest dimension first; the file lists them fastest first."""
    num_dims = cursor.number(_U32, f"the number of dimensions of tensor {quoted(name)}")
    if not 1 <= num_dims <= MAX_DIMENSIONS:
        raise cursor.fail(f"tensor {quoted(name)} has {num_dims} dimensions; expected 1 to {MAX_DIMENSIONS}")
    dims = [cursor.number(_U64, f"the shape of tensor {quoted(name)}") for _ in range(num_dims)]
    if 0 in dims:
        raise cursor.fail(f"tensor {quoted(name)} has an empty dimension: {dims}")
    return tuple(reversed(dims))


def _check_layout(cursor: _Cursor, entries: Sequence[_Entry], data_bytes: int) -> None:
    """Every tensor lies within the data, and no two of them share a byte."""
    previous: _Entry | None = None
    for entry in sorted(entries, key=lambda entry: entry.offset):
        end = entry.offset + entry.num_bytes
        if end > data_bytes:
            raise cursor.fail(
                f"tensor {quoted(entry.name)} ({entry.format.name} of shape {entry.shape}) ends at byte {end} of the "
                f"data, which has {data_bytes}: the file is truncated or damaged; fetch it again"
            )
        if previous is not None and entry.offset < previous.offset + previous.num_bytes:
            raise cursor.fail(f"tensors {quoted(previous.name)} and {quoted(entry.name)} overlap")
        previous = entry
