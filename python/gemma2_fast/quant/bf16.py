"""BF16: the upper half of a float32."""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.fields import packer, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format


def rounded(weights: Floats) -> Floats:
    """Nearest values that BF16 holds, ties to even; a NaN keeps its sign and becomes quiet."""
    bits = np.ascontiguousarray(weights).view(np.uint32)
    nearest = bits + (0x7FFF + (bits >> 16 & 1))
    quiet = bits | 0x0040_0000
    return (np.where(np.isnan(weights), quiet, nearest) & 0xFFFF_0000).view(np.float32)


def _unpack(blocks: Bytes) -> Floats:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _pack(weights: Floats) -> Bytes:
    return (rounded(weights).view(np.uint32) >> 16).astype("<u2").view(np.uint8)


BF16 = Format("BF16", 1, 2, gguf_type=30, unpack=unpacker(_unpack, 1), pack=packer(_pack, 1, 2))
