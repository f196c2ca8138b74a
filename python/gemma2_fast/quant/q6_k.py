"""Q6_K: 256 weights in sixteen groups of 16; weight = (d scale) (q - 32), scale a signed byte a group.

Bytes 0 the low four bits, 128 the high two, 192 the scales, 208 d. Each half of 128 weights takes 64 bytes of low
bits (its weights 0..63 low nibbles, 64..127 high ones) and 32 bytes of high bits (weight 32 g + l: bits 2 g of byte l).
"""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import half, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format

_NIBBLE_SHIFTS = np.array([[0], [4]], dtype=np.uint8)
_PAIR_SHIFTS = np.array([[0], [2], [4], [6]], dtype=np.uint8)


def _unpack(blocks: Bytes) -> Floats:
    low = (blocks[:, :128].reshape(-1, 2, 1, 64) >> _NIBBLE_SHIFTS & 15).reshape(-1, 16, 16)
    high = ((blocks[:, 128:192].reshape(-1, 2, 1, 32) >> _PAIR_SHIFTS & 3) << 4).reshape(-1, 16, 16)
    scales = blocks[:, 192:208].view(np.int8) * half(blocks, 208)
    weights = ((low | high).view(np.int8) - np.int8(32)) * scales[..., None]
    return weights.reshape(-1, 256)


Q6_K = Format("Q6_K", 256, 210, gguf_type=14, unpack=unpacker(_unpack, 256))
