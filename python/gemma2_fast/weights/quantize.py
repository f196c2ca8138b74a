"""Unquantised weights → strips of INT8 and INT4, piece by piece: while a model is loaded, or into a new checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.errors import RequestError, WeightsError
from gemma2_fast.quant import FORMATS, Format
from gemma2_fast.weights.hub import WANTED
from gemma2_fast.weights.load import CONFIG_FILE, Checkpoint, load_checkpoint
from gemma2_fast.weights.mapped_file import drop_pages
from gemma2_fast.weights.names import hf_names
from gemma2_fast.weights.new_directory import check_destination, new_directory
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.prefault import byte_bar
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import ALIGNMENT, SHARD_BYTES, TensorSource, write_quantized

UNQUANTIZED = ("F32", "F16", "BF16")
# What the matrices of the blocks become. The embedding, which is the head too, needs its eight bits.
QUANTIZATIONS: Mapping[str, Format] = MappingProxyType({"int8": FORMATS["INT8_G128"], "int4": FORMATS["INT4_G32"]})
EMBEDDING_FORMAT = FORMATS["INT8_G128"]

PIECE_BYTES = 32 * 2**20
_HEADER_BYTES = 2**20  # more than any header takes

Bytes = NDArray[np.uint8]
Done = Callable[[int], object]


def quantized_format(name: str, shape: tuple[int, ...], quantization: str) -> Format | None:
    """The format of a tensor, by canonical name, under "int8" or "int4"; None for one that stays as it is."""
    if len(shape) != 2 or name.endswith("_bias"):
        return None
    return EMBEDDING_FORMAT if name == "embedding" else QUANTIZATIONS[quantization]


def stored_quantization(format_names: Iterable[str]) -> str | None:
    """ "int8" or "int4" where matrices are stored so; None where there is no such matrix."""
    stored = {name.partition("_")[0].lower() for name in format_names}
    return next((name for name in ("int4", "int8") if name in stored), None)  # an int4 model has an int8 embedding


def quantize_weights(
    weights: Mapping[str, Tensor], quantization: str, num_threads: int, progress: bool
) -> dict[str, Tensor]:
    """The same weights with every unquantised matrix quantised in memory; mapped sources leave it as they are read."""
    pool = _core.ThreadPool(num_threads)
    quantized = {}
    with byte_bar("quantising", weights, progress) as bar:
        for name, tensor in weights.items():
            target = quantized_format(name, tensor.shape, quantization)
            if target is None or tensor.format.name not in UNQUANTIZED:
                quantized[name] = tensor
                bar.update(tensor.num_bytes)
            else:
                whole = _aligned(target.num_bytes(tensor.shape))
                for _ in _quantized_pieces(name, tensor, target, pool, bar.update, whole):
                    pass
                quantized[name] = Tensor(tensor.shape, target, whole)
    return quantized


def quantize_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    origin: Origin,
    *,
    overwrite: bool = False,
    num_threads: int = 1,
    progress: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a quantised copy of a directory's checkpoint to the directory `destination`, complete or not at all.

    Memory: a few pieces of PIECE_BYTES. RequestError: the checkpoint is no directory of unquantised weights, or the
    destination cannot be taken; WeightsError: a weight is not finite; CapacityError: no room on the disk.
    """
    _check_source(checkpoint, destination, overwrite)
    names = hf_names(checkpoint.spec, ())
    companions = [file for file in sorted(checkpoint.path.iterdir()) if file.is_file() and _is_companion(file.name)]
    pool = _core.ThreadPool(num_threads)
    with byte_bar("quantising", checkpoint.weights, progress) as bar:
        sources = {
            names[name]: _source(name, tensor, origin.quantization, pool, bar.update)
            for name, tensor in checkpoint.weights.items()
        }
        num_bytes = sum(source.num_bytes for source in sources.values()) + _HEADER_BYTES
        num_bytes += sum(file.stat().st_size for file in companions)
        with new_directory(destination, num_bytes, overwrite=overwrite, replaceable=_is_ours) as directory:
            write_quantized(directory, sources, origin, shard_bytes)
            for file in sorted(companions, key=lambda file: file.name == CONFIG_FILE):  # without it, no model is there
                shutil.copyfile(file, directory / file.name)
            load_checkpoint(directory)


def _check_source(checkpoint: Checkpoint, destination: Path, overwrite: bool) -> None:
    path = checkpoint.path
    if not path.is_dir():
        raise RequestError(f"{path} is not a directory of safetensors files, which is what can be quantised")
    if path.resolve() == destination.resolve():
        raise RequestError(f"{path} is both source and destination; give another destination")
    if checkpoint.origin is not None:
        raise RequestError(
            f"{path} is already quantised ({checkpoint.origin.quantization}, from {checkpoint.origin.source}); "
            "quantise the checkpoint that it was made from"
        )
    check_destination(destination.resolve(), overwrite, _is_ours)


def _is_ours(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED)


def _is_companion(name: str) -> bool:
    return _is_ours(name) and not name.endswith((".safetensors", ".safetensors.index.json"))


def _source(name: str, tensor: Tensor, quantization: str, pool: _core.ThreadPool, done: Done) -> TensorSource:
    target = quantized_format(name, tensor.shape, quantization)
    if target is None:
        return TensorSource(tensor.shape, tensor.format, partial(_plain_pieces, tensor, done))
    return TensorSource(tensor.shape, target, partial(_quantized_pieces, name, tensor, target, pool, done))


def _plain_pieces(tensor: Tensor, done: Done) -> Iterator[Bytes]:
    yield tensor.data
    done(tensor.num_bytes)


def _quantized_pieces(
    name: str, tensor: Tensor, target: Format, pool: _core.ThreadPool, done: Done, whole: Bytes | None = None
) -> Iterator[Bytes]:
    """The strips of a matrix, some at a time: parts of `whole`, or else in one buffer that each piece overwrites."""
    rows, cols = tensor.shape
    row_bytes, strip_bytes = tensor.format.row_bytes(cols), target.row_bytes(cols)
    strips = min(max(1, PIECE_BYTES // (target.block_rows * row_bytes)), -(-rows // target.block_rows))
    buffer = np.empty(0 if whole is not None else strips * strip_bytes, dtype=np.uint8)
    step = strips * target.block_rows
    for first in range(0, rows, step):
        source = tensor.data[first * row_bytes : (first + step) * row_bytes]
        num_bytes = target.num_bytes((min(step, rows - first), cols))
        begin = first // target.block_rows * strip_bytes
        piece = buffer[:num_bytes] if whole is None else whole[begin : begin + num_bytes]
        bad_row = _core.quantize_into(
            source=tensor.format.name, data=source, cols=cols, target=target.name, out=piece, pool=pool
        )
        if bad_row is not None:
            raise WeightsError(
                f"{name} cannot be quantised: row {first + bad_row} holds an infinity or a NaN; "
                "the checkpoint is damaged, fetch it again"
            )
        drop_pages(source)
        yield piece
        done(source.nbytes)


def _aligned(num_bytes: int) -> Bytes:
    """Uninitialised memory that begins on a cache line."""
    memory = np.empty(num_bytes + ALIGNMENT, dtype=np.uint8)
    first = -memory.ctypes.data % ALIGNMENT
    return memory[first : first + num_bytes]
