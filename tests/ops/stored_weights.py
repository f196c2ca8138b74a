"""Stored weight matrices of every format for the tests of ops: random blocks, and what they mean."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.tensor import Tensor

Array32 = NDArray[np.float32]
Array64 = NDArray[np.float64]

INSTRUCTION_SETS = _core.instruction_sets()
PLAIN_FORMATS = ("F32", "F16", "BF16")
STRIP_FORMATS = tuple(name for name, stored in FORMATS.items() if stored.block_rows > 1)
ROWS_OF_ANY_LENGTH = PLAIN_FORMATS + STRIP_FORMATS
# Where the halves of a block stand; all other bytes may have any value.
HALF_OFFSETS = {
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def stored_matrix(name: str, rows: int, cols: int, seed: int) -> NDArray[np.uint8]:
    """Random stored bytes of a [rows, cols] matrix, at an odd address; every code and both signs of scales occur."""
    rng = np.random.default_rng(seed)
    stored = FORMATS[name]
    count = -(-rows // stored.block_rows) * stored.row_bytes(cols)
    data = np.empty(count + 1, dtype=np.uint8)[1:]
    if name in PLAIN_FORMATS:
        values = rng.standard_normal(rows * cols).astype(np.float32)
        bits = values.astype(np.float16) if name == "F16" else values
        data[:] = (
            bits.view(np.uint8) if name != "BF16" else (bits.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        )
        return data
    data[:] = rng.integers(0, 256, count, dtype=np.uint8)
    blocks = data.reshape(-1, stored.block_bytes)
    if name in STRIP_FORMATS:
        scales = rng.uniform(0.001, 0.02, (len(blocks), stored.block_rows)) * rng.choice([-1, 1], (len(blocks), 1))
        blocks[:, -2 * stored.block_rows :] = (
            (scales.astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        )
        return data
    for offset in HALF_OFFSETS[name]:
        scales = rng.uniform(0.001, 0.02, len(blocks)) * rng.choice([-1, 1], len(blocks))
        blocks[:, offset : offset + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return data


def unpacked(name: str, data: NDArray[np.uint8], rows: int, cols: int) -> Array32:
    """The exact weights float32 [rows, cols]."""
    return Tensor((rows, cols), FORMATS[name], np.ascontiguousarray(data)).to_float32()


def activations(num_tokens: int, cols: int, seed: int) -> Array32:
    return np.random.default_rng(seed).standard_normal((num_tokens, cols)).astype(np.float32)
