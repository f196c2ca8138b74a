"""Writes safetensors files and sharded checkpoints, tensor by tensor and piece by piece."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import FileFormatError
from gemma2_fast.quant import Format
from gemma2_fast.weights.messages import quoted
from gemma2_fast.weights.origin import Origin, to_metadata
from gemma2_fast.weights.safetensors import BYTES, DTYPES, INDEX_FILE, LENGTH_BYTES, SINGLE_FILE
from gemma2_fast.weights.tensor import Tensor

# Of every tensor in a file, and so in memory once it is mapped: a cache line.
ALIGNMENT = 64
SHARD_BYTES = 4_000_000_000
# What is written at once, from multiples of itself on: the system then caches the file on huge pages, which a mapping
# of it needs to be read fast (mapped_file.py).
WRITE_BYTES = 4 << 20


@dataclass(frozen=True)
class TensorSource:
    """A tensor to be written; `pieces` gives its bytes in order, so that they need not be in memory together."""

    shape: tuple[int, ...]
    format: Format
    pieces: Callable[[], Iterable[NDArray[np.uint8]]]

    @property
    def num_bytes(self) -> int:
        return self.format.num_bytes(self.shape)

    @staticmethod
    def of(tensor: Tensor) -> TensorSource:
        return TensorSource(tensor.shape, tensor.format, lambda: (tensor.data,))


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write `tensors` (F32, F16 or BF16) to `path`, which appears complete or not at all."""
    path = Path(path)
    sources = {name: TensorSource.of(tensor) for name, tensor in tensors.items()}
    for name, source in sources.items():
        if source.format.name not in DTYPES:
            raise _refused(path, name, source)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        _write_file(unfinished, sources, metadata or {})
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_quantized(
    directory: Path, tensors: Mapping[str, TensorSource], origin: Origin, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write model.safetensors, or shards of about `shard_bytes` and their index, with our metadata into `directory`.

    Matrices in strips become U8, other tensors stay as they are. One larger than a shard has a shard to itself.
    """
    for name, source in tensors.items():
        if source.format.name not in DTYPES and not _in_strips(source):
            raise _refused(directory, name, source)
    shards = _shards(tensors, shard_bytes)
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        sources = {name: tensors[name] for name in names}
        matrices = {name: (t.format, (t.shape[0], t.shape[1])) for name, t in sources.items() if _in_strips(t)}
        _write_file(directory / file, sources, to_metadata(origin, matrices))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(source.num_bytes for source in tensors.values())},
            "weight_map": {name: file for file, names in zip(files, shards, strict=True) for name in names},
        }
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, ensure_ascii=False), encoding="utf-8")


def _in_strips(source: TensorSource) -> bool:
    return source.format.block_rows > 1


def _refused(path: Path, name: str, source: TensorSource) -> FileFormatError:
    return FileFormatError(
        f"cannot write tensor {quoted(name)} ({source.format.name}) to {path}: "
        f"safetensors files hold {', '.join(DTYPES)}"
    )


def _shards(tensors: Mapping[str, TensorSource], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, source in tensors.items():
        if shards[-1] and filled + source.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += source.num_bytes
    return shards


def _write_file(path: Path, tensors: Mapping[str, TensorSource], metadata: Mapping[str, str]) -> None:
    # Tensors that end on an aligned byte first, matrices before vectors; then the widest, each aligned to its weights.
    def place(name: str) -> tuple[bool, bool, int, str]:
        source = tensors[name]
        return source.num_bytes % ALIGNMENT != 0, len(source.shape) < 2, -source.format.block_bytes, name

    names = sorted(tensors, key=place)
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in names:
        source = tensors[name]
        if name == "__metadata__":
            raise FileFormatError(f"no tensor of {path} may be called {quoted(name)}")
        dtype, shape = (BYTES, [source.num_bytes]) if _in_strips(source) else (source.format.name, list(source.shape))
        end = offset + source.num_bytes
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(LENGTH_BYTES, "little") + text
        for name in names:
            written = 0
            for piece in tensors[name].pieces():
                written += piece.nbytes
                yield piece.reshape(-1).data
            if written != tensors[name].num_bytes:
                raise FileFormatError(
                    f"tensor {quoted(name)} of {path} takes {tensors[name].num_bytes} bytes, its pieces have {written}"
                )

    with path.open("wb", buffering=0) as file:
        for rest in _joined(pieces()):
            while rest:
                rest = rest[file.write(rest) :]
        os.fsync(file.fileno())


def _joined(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """The same bytes in blocks of WRITE_BYTES, each in the place of the one before; the last may be shorter."""
    block, filled = memoryview(bytearray(WRITE_BYTES)), 0
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            taken = min(len(rest), WRITE_BYTES - filled)
            block[filled : filled + taken] = rest[:taken]
            filled += taken
            rest = rest[taken:]
            if filled == WRITE_BYTES:
                yield block
                filled = 0
    yield block[:filled]
