"""Q5_K: Q4_K with a fifth bit a weight; weight = (d scale) q - (dmin min).

Bytes 0 d, 2 dmin, 4 the scales and minima, 16 the fifth bits (bit j of byte l: weight l of group j), 48 the nibbles.
"""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import group_scales_and_mins, half, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format

_NIBBLE_SHIFTS = np.array([[0], [4]], dtype=np.uint8)
_GROUP_SHIFTS = np.arange(8, dtype=np.uint8)[:, None]


def _unpack(blocks: Bytes) -> Floats:
    scales, mins = group_scales_and_mins(blocks[:, 4:16])
    low = (blocks[:, 48:].reshape(-1, 4, 1, 32) >> _NIBBLE_SHIFTS & 15).reshape(-1, 8, 32)
    high = (blocks[:, None, 16:48] >> _GROUP_SHIFTS & 1) << 4
    weights: Floats = (low | high) * (half(blocks, 0) * scales)[..., None] - (half(blocks, 2) * mins)[..., None]
    return weights.reshape(-1, 256)


Q5_K = Format("Q5_K", 256, 176, gguf_type=13, unpack=unpacker(_unpack, 256))
