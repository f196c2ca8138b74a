"""Q4_1: 32 weights are two halves d and m and 32 nibbles q; weight = d q + m."""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import half, half_bytes, inverse, nibbles, packed_nibbles, packer, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format


def _unpack(blocks: Bytes) -> Floats:
    return nibbles(blocks[:, 4:]) * half(blocks, 0) + half(blocks, 2)


def _pack(weights: Floats) -> Bytes:
    """m is the least weight and m + 15 d the largest; codes round by the unrounded d and m."""
    m = weights.min(axis=1, keepdims=True)
    d = (weights.max(axis=1, keepdims=True) - m) / np.float32(15)
    codes = np.minimum((weights - m) * inverse(d) + np.float32(0.5), np.float32(15))
    return np.concatenate(
        [half_bytes(d, "Q4_1"), half_bytes(m, "Q4_1"), packed_nibbles(codes.astype(np.uint8))], axis=1
    )


Q4_1 = Format("Q4_1", 32, 20, gguf_type=3, unpack=unpacker(_unpack, 32), pack=packer(_pack, 32, 20))
