"""Safetensors files: a JSON header and raw tensors, read without copying and checked byte for byte.

Quantised matrices are U8 to other readers; our metadata says what they are.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import FileFormatError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.mapped_file import map_file
from gemma2_fast.weights.messages import listed, quoted
from gemma2_fast.weights.origin import Matrices, Origin, from_metadata
from gemma2_fast.weights.strict_json import load_json_object
from gemma2_fast.weights.tensor import Tensor

LENGTH_BYTES = 8
# The format's own bound: a longer header is an attack on the reader's memory.
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
# Far above any tensor, and low enough for its size in bytes to fit every integer type it meets later.
MAX_WEIGHTS = 1 << 48
DTYPES = ("F32", "F16", "BF16")
BYTES = "U8"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Only a plain name: a path could reach files outside the checkpoint. Links are fine, hub caches are made of them.
SHARD_NAME = re.compile(r"[^/\\\x00-\x1f]{1,240}\.safetensors")


@dataclass(frozen=True)
class SafetensorsFile:
    """The tensors of one file by name, views of its mapped bytes, and its string metadata.

    origin: that of the quantised tensors, None for a file without our metadata.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    origin: Origin | None


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of all files of a checkpoint, and the origin that they share."""

    tensors: dict[str, Tensor]
    origin: Origin | None


@dataclass(frozen=True)
class _Entry:
    """One tensor of a header; its bytes are [begin, end) of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_safetensors(path: str | os.PathLike[str]) -> SafetensorsFile:
    """Map a safetensors file; FileFormatError where header and data do not fit each other exactly."""
    path = Path(path)
    content = map_file(path, "safetensors")
    header_bytes = _header_bytes(path, content)
    header = load_json_object(header_bytes, f"the header of {path}")
    metadata = _metadata(path, header.pop("__metadata__", {}))
    entries = [_entry(path, name, value) for name, value in header.items()]
    origin, matrices = from_metadata(path, metadata)
    _check_matrices(path, entries, matrices)
    _refuse_other_dtypes(path, entries, matrices)
    data = content[LENGTH_BYTES + len(header_bytes) :]
    _check_layout(path, entries, data.nbytes)
    tensors = {}
    for entry in entries:
        format, shape = matrices.get(entry.name) or (FORMATS[entry.dtype], entry.shape)
        tensors[entry.name] = Tensor(shape, format, data[entry.begin : entry.end])
    return SafetensorsFile(tensors, metadata, origin)


def _header_bytes(path: Path, content: NDArray[np.uint8]) -> bytes:
    if content.nbytes < LENGTH_BYTES:
        raise FileFormatError(
            f"{path} is not a safetensors file: it has {content.nbytes} bytes, a header length takes {LENGTH_BYTES}"
        )
    length = int.from_bytes(content[:LENGTH_BYTES].tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise FileFormatError(
            f"{path} is not a safetensors file: its first {LENGTH_BYTES} bytes give a header of {length} bytes, "
            f"the format allows {MAX_HEADER_BYTES}"
        )
    if length > content.nbytes - LENGTH_BYTES:
        raise FileFormatError(
            f"{path} is truncated: its header should have {length} bytes and {content.nbytes - LENGTH_BYTES} are left; "
            "fetch the file again"
        )
    header = content[LENGTH_BYTES : LENGTH_BYTES + length].tobytes()
    if not header.startswith(b"{"):
        raise FileFormatError(f"{path} is not a safetensors file: its header starts with {header[:1]!r}, not with '{{'")
    return header


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        raise FileFormatError(f"{path}: __metadata__ must be an object, got {quoted(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise FileFormatError(f"{path}: __metadata__ must map text to text, {quoted(key)} maps to {quoted(text)}")
    return value


def _entry(path: Path, name: str, value: object) -> _Entry:
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(f"{where} must have exactly dtype, shape and data_offsets, got {quoted(value)}")
    dtype = value["dtype"]
    if not isinstance(dtype, str):
        raise FileFormatError(f"{where}: dtype must be text, got {quoted(dtype)}")
    shape = _whole_numbers(value["shape"], f"{where}: shape")
    if len(shape) > MAX_DIMENSIONS:
        raise FileFormatError(f"{where} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are supported")
    if math.prod(max(dim, 1) for dim in shape) > MAX_WEIGHTS:
        raise FileFormatError(f"{where}: shape {quoted(shape)} is beyond any tensor (2^48 weights)")
    offsets = _whole_numbers(value["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2:
        raise FileFormatError(f"{where}: data_offsets must be [begin, end], got {quoted(offsets)}")
    return _Entry(name, dtype, shape, *offsets)


def _whole_numbers(value: object, what: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int and 0 <= item < 1 << 63 for item in value):
        raise FileFormatError(f"{what} must be a list of whole numbers from 0 to 2^63 - 1, got {quoted(value)}")
    return tuple(value)


def _check_matrices(path: Path, entries: Sequence[_Entry], matrices: Matrices) -> None:
    """Every matrix that the metadata lists is there, as the bytes of its shape."""
    found = {entry.name: entry for entry in entries}
    absent = [quoted(name) for name in matrices if name not in found]
    if absent:
        raise FileFormatError(
            f"{path}: its metadata lists tensors that it does not hold: {listed(absent)}; quantise the model again"
        )
    for name, (format, shape) in matrices.items():
        needed, entry = format.num_bytes(shape), found[name]
        if (entry.dtype, entry.shape) != (BYTES, (needed,)):
            raise FileFormatError(
                f"{path}: tensor {quoted(name)}: {format.name} of shape {shape} takes {BYTES} ({needed},), "
                f"the file holds {quoted(entry.dtype)} {quoted(entry.shape)}; quantise the model again"
            )


def _refuse_other_dtypes(path: Path, entries: Sequence[_Entry], matrices: Matrices) -> None:
    others = [
        f"{quoted(entry.name)} ({quoted(entry.dtype)})"
        for entry in entries
        if entry.dtype not in DTYPES and entry.name not in matrices
    ]
    if others:
        raise FileFormatError(
            f"{path} holds tensors of unsupported dtypes: {listed(others)}; "
            f"supported are {', '.join(DTYPES)}: convert the checkpoint to one of them"
        )


def _check_layout(path: Path, entries: Sequence[_Entry], data_bytes: int) -> None:
    """Every tensor has the bytes of its shape, and together they cover the data without a gap or an overlap."""
    covered = 0
    for entry in sorted(entries, key=lambda entry: (entry.begin, entry.end)):
        where = f"{path}: tensor {quoted(entry.name)}"
        needed = math.prod(entry.shape) * (1 if entry.dtype == BYTES else FORMATS[entry.dtype].block_bytes)
        if entry.end - entry.begin != needed:
            raise FileFormatError(
                f"{where}: {entry.dtype} of shape {entry.shape} takes {needed} bytes, "
                f"its data_offsets [{entry.begin}, {entry.end}] give {entry.end - entry.begin}"
            )
        if entry.end > data_bytes:
            raise FileFormatError(
                f"{where} ends at byte {entry.end} of the data, which has {data_bytes}: "
                "the file is truncated or its header is wrong; fetch it again"
            )
        if entry.begin != covered:
            fault = "overlaps the one before it" if entry.begin < covered else "leaves a hole before it"
            raise FileFormatError(f"{where} {fault}: it begins at byte {entry.begin} of the data, expected {covered}")
        covered = entry.end
    if covered != data_bytes:
        raise FileFormatError(f"{path} has {data_bytes - covered} bytes behind its last tensor that belong to none")


def read_safetensors_directory(directory: str | os.PathLike[str]) -> StoredWeights:
    """The tensors of a checkpoint: model.safetensors, or the shards that model.safetensors.index.json names."""
    directory = Path(directory)
    if os.path.lexists(directory / SINGLE_FILE):
        file = read_safetensors(directory / SINGLE_FILE)
        return StoredWeights(file.tensors, file.origin)
    index = directory / INDEX_FILE
    if index.exists():
        return _read_shards(index)
    found = sorted(entry.name for entry in directory.iterdir() if entry.suffix in (".safetensors", ".bin", ".gguf"))
    raise FileFormatError(
        f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
        + (f"; it does hold {listed(found)}" if found else "; download the checkpoint's safetensors files into it")
    )


def _read_shards(index: Path) -> StoredWeights:
    shard_of = _weight_map(index)
    shards = sorted(set(shard_of.values()))
    missing = [shard for shard in shards if not (index.parent / shard).exists()]
    if missing:
        raise FileFormatError(
            f"{index} names {len(missing)} of {len(shards)} shards that are not beside it: {listed(missing)}; "
            "the download is incomplete, fetch it again"
        )
    tensors: dict[str, Tensor] = {}
    origins: dict[Origin | None, str] = {}
    for shard in shards:
        file = read_safetensors(index.parent / shard)
        origins.setdefault(file.origin, shard)
        for name, tensor in file.tensors.items():
            if shard_of.get(name) != shard:
                expected = f"expects it in {shard_of[name]}" if name in shard_of else "does not list it"
                raise FileFormatError(
                    f"{index.parent / shard} holds tensor {quoted(name)}, but {index.name} {expected}"
                )
            tensors[name] = tensor
    absent = [f"{quoted(name)} ({shard})" for name, shard in shard_of.items() if name not in tensors]
    if absent:
        raise FileFormatError(f"{index} lists tensors that their shards do not hold: {listed(absent)}")
    if len(origins) > 1:
        raise FileFormatError(
            f"{index}: its shards do not belong together: {' and '.join(list(origins.values())[:2])} come from "
            "different quantisations; quantise the model again"
        )
    return StoredWeights(tensors, next(iter(origins)))


def _weight_map(index: Path) -> dict[str, str]:
    content = map_file(index, "JSON")
    if content.nbytes > MAX_HEADER_BYTES:
        raise FileFormatError(f"{index} has {content.nbytes} bytes; an index has at most {MAX_HEADER_BYTES}")
    shard_of = load_json_object(content.tobytes(), str(index)).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise FileFormatError(f"{index}: weight_map must map tensor names to file names, got {quoted(shard_of)}")
    for name, shard in shard_of.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise FileFormatError(
                f"{index}: tensor {quoted(name)} lies in {quoted(shard)}; "
                "expected the plain name of a .safetensors file beside the index"
            )
    return shard_of
