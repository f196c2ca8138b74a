"""INT8_G128: strips of 64 rows; a group of 128 weights of a row has a bfloat16 scale; weight = scale (code - 128).

A block holds codes [32][64][4], four of a row after four of the row before, then the 64 scales.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.quant.format import Bytes, Floats
from gemma2_fast.quant.strips import STRIP_ROWS, in_fours, in_rows, scale_bytes, scales_of, strip_format

_GROUP = 128
_CODE_BYTES = _GROUP * STRIP_ROWS


def signed_codes(blocks: Bytes) -> NDArray[np.int8]:
    """code - 128, [N, 64, 128]."""
    codes = in_rows(blocks[:, :_CODE_BYTES].reshape(-1, _GROUP // 4, STRIP_ROWS, 4))
    return (codes ^ np.uint8(128)).view(np.int8)


def _unpack(blocks: Bytes) -> Floats:
    return signed_codes(blocks) * scales_of(blocks)


def _pack(weights: Floats) -> Bytes:
    """The scale is max |w| / 127 rounded up, so that no code leaves 1..255; codes round to nearest, ties to even."""
    exact = np.abs(weights).max(axis=2, keepdims=True) / np.float32(127)
    scales = (exact.view(np.uint32) + np.uint32(0xFFFF) & np.uint32(0xFFFF0000)).view(np.float32)
    steps = np.where(scales > 0, np.rint(weights / scales), np.float32(0))
    codes = (steps + np.float32(128)).astype(np.uint8)
    return np.concatenate([in_fours(codes).reshape(len(codes), -1), scale_bytes(scales)], axis=1)


INT8_G128 = strip_format("INT8_G128", _GROUP, _CODE_BYTES, _unpack, _pack)
