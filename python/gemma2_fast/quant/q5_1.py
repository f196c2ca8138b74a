"""Q5_1: 32 weights are two halves d and m, 32 fifth bits and 32 nibbles, together codes q; weight = d q + m."""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import (
    fifth_bits,
    half,
    half_bytes,
    inverse,
    nibbles,
    packed_fifth_bits,
    packed_nibbles,
    packer,
    unpacker,
)
from gemma2_fast.quant.format import Bytes, Floats, Format


def _unpack(blocks: Bytes) -> Floats:
    return (nibbles(blocks[:, 8:]) | fifth_bits(blocks[:, 4:8])) * half(blocks, 0) + half(blocks, 2)


def _pack(weights: Floats) -> Bytes:
    """m is the least weight and m + 31 d the largest; codes round by the unrounded d and m."""
    m = weights.min(axis=1, keepdims=True)
    d = (weights.max(axis=1, keepdims=True) - m) / np.float32(31)
    codes = np.minimum((weights - m) * inverse(d) + np.float32(0.5), np.float32(31)).astype(np.uint8)
    return np.concatenate(
        [half_bytes(d, "Q5_1"), half_bytes(m, "Q5_1"), packed_fifth_bits(codes), packed_nibbles(codes)], axis=1
    )


Q5_1 = Format("Q5_1", 32, 24, gguf_type=7, unpack=unpacker(_unpack, 32), pack=packer(_pack, 32, 24))
