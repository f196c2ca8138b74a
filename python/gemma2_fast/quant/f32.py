"""F32: IEEE single precision, as it is."""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.format import Bytes, Floats, Format


def _unpack(blocks: Bytes) -> Floats:
    return np.ascontiguousarray(blocks).view("<f4").astype(np.float32)


def _pack(weights: Floats) -> Bytes:
    return np.ascontiguousarray(weights).astype("<f4").view(np.uint8)


F32 = Format("F32", block_weights=1, block_bytes=4, gguf_type=0, unpack=_unpack, pack=_pack)
