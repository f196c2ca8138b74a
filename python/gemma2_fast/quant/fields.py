"""Pieces that several block layouts share: half-precision scales, nibbles, fifth bits, and work in small chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import WeightsError
from gemma2_fast.quant.format import Bytes, Floats

# Weights a conversion handles at once: its temporaries stay in the cache whatever the size of the tensor.
CHUNK_WEIGHTS = 1 << 18

In = TypeVar("In", np.uint8, np.float32)
Out = TypeVar("Out", np.uint8, np.float32)


def _in_chunks(
    convert: Callable[[NDArray[In]], NDArray[Out]], width: int, chunk: int, dtype: type[Out]
) -> Callable[[NDArray[In]], NDArray[Out]]:
    def convert_all(blocks: NDArray[In]) -> NDArray[Out]:
        out = np.empty((len(blocks), width), dtype=dtype)
        with np.errstate(all="ignore"):  # a stored scale may be infinite or NaN, and then so are its weights
            for start in range(0, len(blocks), chunk):
                out[start : start + chunk] = convert(blocks[start : start + chunk])
        return out

    return convert_all


def unpacker(convert: Callable[[Bytes], Floats], block_weights: int) -> Callable[[Bytes], Floats]:
    """`convert` of some blocks, made to take any number of them with bounded temporaries."""
    return _in_chunks(convert, block_weights, CHUNK_WEIGHTS // block_weights, np.float32)


def packer(convert: Callable[[Floats], Bytes], block_weights: int, block_bytes: int) -> Callable[[Floats], Bytes]:
    """The counterpart of `unpacker` for weights [N, block_weights]."""
    return _in_chunks(convert, block_bytes, CHUNK_WEIGHTS // block_weights, np.uint8)


def half(blocks: Bytes, offset: int) -> Floats:
    """The half-precision number at byte `offset` of every block, float32 [N, 1]."""
    return blocks[:, offset : offset + 2].view("<f2").astype(np.float32)


def half_bytes(values: Floats, format_name: str) -> Bytes:
    """`values` [N, 1] as half-precision bytes [N, 2]; WeightsError where one is not a finite half."""
    halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        raise WeightsError(
            f"cannot store weights as {format_name}: a block is not finite or its scale exceeds 65504, the largest half"
        )
    return halves.view(np.uint8)


def inverse(scales: Floats) -> Floats:
    """1 / scale; 0 where that is infinite, so that blocks of zeros get the code of zero."""
    result = np.float32(1) / scales
    result[~np.isfinite(result)] = 0
    return result


def nibbles(packed: Bytes) -> Bytes:
    """[N, n] bytes as [N, 2 n] codes: every low nibble, then every high one."""
    return np.concatenate([packed & 15, packed >> 4], axis=1)


def packed_nibbles(codes: Bytes) -> Bytes:
    """The inverse of `nibbles`; bits above the fourth are left out."""
    middle = codes.shape[1] // 2
    return codes[:, :middle] & np.uint8(15) | codes[:, middle:] << np.uint8(4)


def fifth_bits(packed: Bytes) -> Bytes:
    """[N, 4] bytes as [N, 32] values 0 or 16, the lowest bit of the first byte first."""
    return np.unpackbits(packed, axis=1, bitorder="little") << np.uint8(4)


def packed_fifth_bits(codes: Bytes) -> Bytes:
    """The fifth bit of codes [N, 32] as [N, 4] bytes."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def group_scales_and_mins(packed: Bytes) -> tuple[Floats, Floats]:
    """The eight 6-bit scales and the eight 6-bit minima of a K block, float32 [N, 8] each, from its 12 bytes."""
    first, second, mixed = np.hsplit(packed, 3)
    scales = np.concatenate([first & 63, mixed & 15 | first >> 6 << 4], axis=1)
    mins = np.concatenate([second & 63, mixed >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)
