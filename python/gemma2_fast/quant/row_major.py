"""Strips reordered into rows, as the GPU kernels read them (triton_kernels/weight_formats.py): the same values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import WeightsError
from gemma2_fast.quant import int4, int8
from gemma2_fast.quant.format import Bytes, Format
from gemma2_fast.quant.strips import STRIP_ROWS, stored_scales


@dataclass(frozen=True)
class RowMajor:
    """A matrix [rows, cols] with groups of 128 columns, the last of which may be shorter.

    codes: int8 [rows, cols], or of int4 uint8 [rows, groups, 64], of each group column i in the low nibble of byte i
    and column 64 + i in the high one, each as code 0..15; past the last column they are 8, which is zero.
    scales: the bits of bfloat16, uint16 [rows, groups].
    factors: None, or of int4 uint8 [rows, groups, 2]: factor + 8 of columns 32 j to 32 j + 31 in the low nibble of byte
    j, of the columns 64 farther on in the high one.
    """

    codes: NDArray[np.int8] | Bytes
    scales: NDArray[np.uint16]
    factors: Bytes | None


def row_major(format: Format, data: Bytes, shape: tuple[int, int]) -> RowMajor:
    """Of the bytes of a tensor. WeightsError for formats that no GPU kernel reads."""
    rows, cols = shape
    if format not in (int8.INT8_G128, int4.INT4_G32):
        raise WeightsError(f"{format.name} has no row-major form: expected INT8_G128 or INT4_G32; quantize the model")
    blocks = data.reshape(-1, format.block_bytes)
    scales = _in_rows(stored_scales(blocks)[:, :, None], rows)[:, :, 0]
    if format is int8.INT8_G128:
        codes = _in_rows(int8.signed_codes(blocks), rows).reshape(rows, -1)
        return RowMajor(np.ascontiguousarray(codes[:, :cols]), scales, None)
    return RowMajor(
        _in_rows(_halves(int4.stored_codes(blocks)), rows), scales, _in_rows(_halves(int4.stored_factors(blocks)), rows)
    )


def _in_rows(tiles: NDArray[Any], rows: int) -> NDArray[Any]:
    """[strips * groups, 64, W] → [rows, groups, W]."""
    strips = -(-rows // STRIP_ROWS)
    by_strip = tiles.reshape(strips, -1, STRIP_ROWS, tiles.shape[2]).swapaxes(1, 2)
    return np.ascontiguousarray(by_strip.reshape(strips * STRIP_ROWS, -1, tiles.shape[2])[:rows])


def _halves(nibbles: Bytes) -> Bytes:
    """[..., W] → [..., W / 2]: the first half in the low nibbles, the second in the high ones."""
    middle = nibbles.shape[-1] // 2
    return nibbles[..., :middle] | nibbles[..., middle:] << np.uint8(4)
