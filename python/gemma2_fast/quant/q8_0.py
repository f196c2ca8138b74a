"""Q8_0: 32 weights are a half d and 32 signed bytes q; weight = d q."""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import half, half_bytes, inverse, packer, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format


def _unpack(blocks: Bytes) -> Floats:
    return blocks[:, 2:].view(np.int8) * half(blocks, 0)


def _pack(weights: Floats) -> Bytes:
    """d = max|w| / 127; codes round half away from zero, by the unrounded d."""
    d = np.abs(weights).max(axis=1, keepdims=True) / np.float32(127)
    scaled = weights * inverse(d)
    size = np.abs(scaled)
    whole = np.floor(size)
    codes = np.copysign(whole + (size - whole >= 0.5), scaled)
    return np.concatenate([half_bytes(d, "Q8_0"), codes.astype(np.int8).view(np.uint8)], axis=1)


Q8_0 = Format("Q8_0", 32, 34, gguf_type=8, unpack=unpacker(_unpack, 32), pack=packer(_pack, 32, 34))
