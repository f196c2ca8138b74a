"""Q4_K: 256 weights in eight groups of 32; weight = (d scale) q - (dmin min), scale and min 6 bits a group.

Bytes 0 d, 2 dmin, 4 the scales and minima, 16 the nibbles: 32 bytes hold group 2 i low and group 2 i + 1 high.
"""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import group_scales_and_mins, half, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format

_NIBBLE_SHIFTS = np.array([[0], [4]], dtype=np.uint8)


def _unpack(blocks: Bytes) -> Floats:
    scales, mins = group_scales_and_mins(blocks[:, 4:16])
    codes = (blocks[:, 16:].reshape(-1, 4, 1, 32) >> _NIBBLE_SHIFTS & 15).reshape(-1, 8, 32)
    weights: Floats = codes * (half(blocks, 0) * scales)[..., None] - (half(blocks, 2) * mins)[..., None]
    return weights.reshape(-1, 256)


Q4_K = Format("Q4_K", 256, 144, gguf_type=12, unpack=unpacker(_unpack, 256))
