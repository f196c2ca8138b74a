"""Q5_0: 32 weights are a half d, 32 fifth bits and 32 nibbles, together codes q; weight = d (q - 16)."""

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
    codes = nibbles(blocks[:, 6:]) | fifth_bits(blocks[:, 2:6])
    return (codes.view(np.int8) - np.int8(16)) * half(blocks, 0)


def _pack(weights: Floats) -> Bytes:
    """d maps the weight of largest magnitude to -16 exactly; codes round by the unrounded d."""
    largest = np.take_along_axis(weights, np.abs(weights).argmax(axis=1, keepdims=True), axis=1)
    d = largest / np.float32(-16)
    codes = np.minimum(weights * inverse(d) + np.float32(16.5), np.float32(31)).astype(np.uint8)
    return np.concatenate([half_bytes(d, "Q5_0"), packed_fifth_bits(codes), packed_nibbles(codes)], axis=1)


Q5_0 = Format("Q5_0", 32, 22, gguf_type=6, unpack=unpacker(_unpack, 32), pack=packer(_pack, 32, 22))
