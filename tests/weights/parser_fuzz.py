"""Structure-aware mutation of weight files: a parser takes a mutated file or refuses it, and does nothing else."""

from __future__ import annotations

import copy
import json
import os
import struct
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma2_fast.errors import FileFormatError, Gemma2FastError
from gemma2_fast.weights.tensor import Tensor

File = TypeVar("File")

MAX_SECONDS = 2.0
MAX_MESSAGE_CHARACTERS = 2000
INTEGERS = [0, 1, 2, 3, 4, 7, 8, 14, 30, 31, 32, 33, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63]

GGUF_ACTIONS = ["data", "data", "integer", "nudge", "byte", "copy", "drop", "repeat", "swap", "insert", "cut"]
SAFETENSORS_ACTIONS = ["value", "value", "data", "data", "swap", "drop", "repeat", "text", "cut", "extend"]


@dataclass
class Outcome:
    loaded: int = 0
    refused: int = 0

    def __str__(self) -> str:
        return f"{self.loaded + self.refused} mutated files: {self.loaded} loaded, {self.refused} refused"


def num_fuzz_files(default: int = 200) -> int:
    """How many files a fuzzing test tries: GEMMA2_FAST_FUZZ_FILES, or `default`."""
    return int(os.environ.get("GEMMA2_FAST_FUZZ_FILES", default))


def fuzz_parser(
    mutated: st.SearchStrategy[bytes],
    read: Callable[[Path], File],
    use: Callable[[File], object],
    path: Path,
    num_files: int | None = None,
) -> Outcome:
    """Write each mutated file to `path` and `read` it; what still loads goes to `use`.

    Only a FileFormatError may come out of `read`, which may not take long, and only the package's own exceptions out
    of `use`.
    """
    outcome = Outcome()

    @settings(
        max_examples=num_fuzz_files() if num_files is None else num_files,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(mutated)
    def check(content: bytes) -> None:
        path.unlink(missing_ok=True)  # a new file: views of the last one stay mapped
        path.write_bytes(content)
        started = time.thread_time()
        message: str | None = None
        try:
            file = read(path)
        except FileFormatError as error:
            message = str(error)
        assert time.thread_time() - started < MAX_SECONDS
        if message is None:
            outcome.loaded += 1
            with suppress(Gemma2FastError):
                use(file)
        else:
            outcome.refused += 1
            assert path.name in message
            assert len(message) < MAX_MESSAGE_CHARACTERS

    check()
    return outcome


def check_tensors(tensors: Mapping[str, Tensor], file_bytes: int) -> None:
    """Every tensor has the bytes of its shape, all within the mapped file, and gives its weights."""
    for name, tensor in tensors.items():
        assert tensor.num_bytes == tensor.format.num_bytes(tensor.shape), name
        mapped = tensor.data
        while isinstance(mapped.base, np.ndarray):
            mapped = mapped.base
        assert mapped.nbytes == file_bytes, name
        offset = tensor.data.ctypes.data - mapped.ctypes.data
        assert tensor.num_bytes == 0 or 0 <= offset <= file_bytes - tensor.num_bytes, name
        assert tensor.to_float32().shape == tensor.shape, name


@st.composite
def mutated_gguf(draw: st.DrawFn, base: bytes) -> bytes:
    """`base`, a valid GGUF file, with one to three of its fields changed."""
    fields = gguf_fields(base)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        at = draw(st.integers(0, len(fields) - 1))
        action = draw(st.sampled_from(GGUF_ACTIONS))
        if action == "data":  # the longest fields are tensors
            at = draw(st.sampled_from(sorted(range(len(fields)), key=lambda index: -len(fields[index]))[:8]))
            fields[at] = _with_byte(fields[at], draw)
        elif action == "integer":
            fields[at] = draw(st.sampled_from(INTEGERS)).to_bytes(16, "little")[: len(fields[at])]
        elif action == "nudge":
            fields[at] = _nudged(fields[at], draw(st.sampled_from([-33, -32, -1, 1, 32, 33])))
        elif action == "byte":
            fields[at] = _with_byte(fields[at], draw)
        elif action == "copy":
            same = [field for field in fields if len(field) == len(fields[at])]
            fields[at] = draw(st.sampled_from(same))
        elif action == "drop" and len(fields) > 1:
            del fields[at]
        elif action == "repeat":
            fields.insert(at, fields[at])
        elif action == "swap":
            other = draw(st.integers(0, len(fields) - 1))
            fields[at], fields[other] = fields[other], fields[at]
        elif action == "insert":
            fields.insert(at, draw(st.binary(min_size=1, max_size=40)))
        elif action == "cut":
            fields[at] = fields[at][: draw(st.integers(0, max(len(fields[at]) - 1, 0)))]
    return b"".join(fields)


@st.composite
def mutated_safetensors(draw: st.DrawFn, base: bytes) -> bytes:
    """`base`, a valid safetensors file, with one to three changes to its header's tree, its text or its bytes."""
    header_bytes = int.from_bytes(base[:8], "little")
    header, data = json.loads(base[8 : 8 + header_bytes]), base[8 + header_bytes :]
    text: bytes | None = None
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        action = draw(st.sampled_from(SAFETENSORS_ACTIONS))
        places = list(_json_places(header))
        owner, key = places[draw(st.integers(0, len(places) - 1))] if places else ({}, "")
        if action == "value" and places:
            owner[key] = draw(_other_json(owner[key]))
        elif action == "swap" and places:
            other, other_key = places[draw(st.integers(0, len(places) - 1))]
            owner[key], other[other_key] = copy.deepcopy(other[other_key]), copy.deepcopy(owner[key])
        elif action == "drop" and places:
            del owner[key]
        elif action == "repeat" and places and isinstance(owner, dict):
            owner[draw(st.sampled_from(["", "again", "__metadata__", "dtype"]))] = copy.deepcopy(owner[key])
        elif action == "text":
            text = _with_byte(json.dumps(header).encode() if text is None else text, draw)
        elif action == "data":
            data = _with_byte(data, draw)
        elif action == "cut":
            data = data[: draw(st.integers(0, len(data)))]
        elif action == "extend":
            data += draw(st.binary(max_size=8))
    text = json.dumps(header).encode() if text is None else text
    length = draw(st.sampled_from([len(text)] * 30 + [len(text) - 1, len(text) + 1, 0, 2**31, 2**63, 2**64 - 1]))
    return (length % 2**64).to_bytes(8, "little") + text + data


def _nudged(field: bytes, by: int) -> bytes:
    return ((int.from_bytes(field, "little") + by) % 256 ** len(field)).to_bytes(len(field), "little") if field else b""


def _with_byte(field: bytes, draw: st.DrawFn) -> bytes:
    if not field:
        return draw(st.binary(min_size=1, max_size=1))
    at = draw(st.integers(0, len(field) - 1))
    return field[:at] + bytes([draw(st.integers(0, 255))]) + field[at + 1 :]


def _json_places(tree: object) -> list[tuple[dict | list, str | int]]:
    """Every (container, key) of a JSON tree."""
    if not isinstance(tree, dict | list):
        return []
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    return [place for key in keys for place in [(tree, key), *_json_places(tree[key])]]


def _other_json(value: object) -> st.SearchStrategy[object]:
    numbers = st.sampled_from([*INTEGERS, 2**64, -1, 1.5])
    if isinstance(value, int):
        return st.one_of(st.sampled_from([value - 1, value + 1, 2 * value, -value]), numbers)
    if isinstance(value, str):
        dtypes = ["F32", "F16", "BF16", "F64", "I64", "F8_E4M3", "U8", "", "\ud800"]
        matrices = ["INT8_G128 64 128", "INT4_G32 64 32", "INT4_G32 9999999 9999999", "INT8_G128 1 1", "INT9 1 1"]
        return st.sampled_from([*dtypes, *matrices, "0", "1", "3", "int8"])
    return st.one_of(numbers, st.sampled_from([[], {}, None, True, "x", [1], [1, 2, 3]]))


def gguf_fields(content: bytes) -> list[bytes]:
    """A valid GGUF file cut into its fields: magic, counts, lengths, types, values, padding, each tensor's data."""
    fields: list[bytes] = []
    position = 0
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

    def take(size: int) -> bytes:
        nonlocal position
        fields.append(content[position : position + size])
        position += size
        return fields[-1]

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    def text() -> bytes:
        return take(number(8))

    def value(kind: int) -> None:
        if kind == 8:
            text()
        elif kind == 9:
            element, count = number(4), number(8)
            if element == 8:
                for _ in range(count):
                    text()
            else:
                take(count * sizes[element])
        else:
            take(sizes[kind])

    take(4)
    take(4)
    num_tensors, num_keys = number(8), number(8)
    alignment = 32
    for _ in range(num_keys):
        key = text()
        value(number(4))
        if key == b"general.alignment":
            alignment = struct.unpack("<I", fields[-1])[0]
    offsets = []
    for _ in range(num_tensors):
        text()
        for _ in range(number(4)):
            take(8)
        take(4)
        offsets.append(number(8))
    take(-position % alignment)
    start = position
    for offset in sorted(offsets)[1:]:
        take(start + offset - position)
    take(len(content) - position)
    return fields
