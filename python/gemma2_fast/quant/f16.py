"""F16: IEEE half precision."""

from __future__ import annotations

import numpy as np

from gemma2_fast.errors import WeightsError
from gemma2_fast.quant.fields import packer, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format


def _unpack(blocks: Bytes) -> Floats:
    return blocks.view("<f2").astype(np.float32)


def _pack(weights: Floats) -> Bytes:
    halves = weights.astype("<f2")
    if (np.isinf(halves) & np.isfinite(weights)).any():
        raise WeightsError("cannot store weights as F16: a value exceeds 65504, the largest half; use BF16 or F32")
    return halves.view(np.uint8)


F16 = Format("F16", 1, 2, gguf_type=1, unpack=unpacker(_unpack, 1), pack=packer(_pack, 1, 2))
