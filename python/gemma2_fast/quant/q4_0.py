"""Q4_0: 32 weights are a half d and 32 nibbles q; weight = d (q - 8)."""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import half, half_bytes, inverse, nibbles, packed_nibbles, packer, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format


def _unpack(blocks: Bytes) -> Floats:
    return (nibbles(blocks[:, 2:]).view(np.int8) - np.int8(8)) * half(blocks, 0)


def _pack(weights: Floats) -> Bytes:
    """d maps the weight of largest magnitude to -8 exactly; codes round by the unrounded d."""
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=1, keepdims=True), axis=1)
    d = largest / np.float32(-8)
    codes = np.minimum(weights * inverse(d) + np.float32(8.5), np.float32(15))
    return np.concatenate([half_bytes(d, "Q4_0"), packed_nibbles(codes.astype(np.uint8))], axis=1)


Q4_0 = Format("Q4_0", 32, 18, gguf_type=2, unpack=unpacker(_unpack, 32), pack=packer(_pack, 32, 18))
