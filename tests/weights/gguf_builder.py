"""GGUF files written field by field, so that a test can get any field wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def value(type_id: int, item: object) -> bytes:
    return string(item) if isinstance(item, str | bytes) else struct.pack("<" + _CODES[type_id], item)


def scalar(key: str | bytes, type_id: int, item: object) -> bytes:
    return string(key) + u32(type_id) + value(type_id, item)


def array(key: str | bytes, type_id: int, items: list[object]) -> bytes:
    return string(key) + u32(ARRAY) + u32(type_id) + u64(len(items)) + b"".join(value(type_id, i) for i in items)


def tensor(name: str | bytes, dims: list[int], type_id: int, offset: int) -> bytes:
    """`dims` as the file has them, fastest first."""
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


@dataclass
class Gguf:
    """A whole file; counts and padding follow from the parts unless a test says otherwise."""

    keys: list[bytes] = field(default_factory=list)
    tensors: list[bytes] = field(default_factory=list)
    data: bytes = b""
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_keys: int | None = None
    alignment: int = 32

    def to_bytes(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_keys = len(self.keys) if self.num_keys is None else self.num_keys
        parts = [self.magic, u32(self.version), u64(num_tensors), u64(num_keys), *self.keys, *self.tensors]
        header = b"".join(parts)
        return header + bytes(-len(header) % self.alignment) + self.data if self.data else header
