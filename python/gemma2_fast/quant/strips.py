"""Pieces that the formats of strips share: bfloat16 scales, the order of four-byte dot products, and their records."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import WeightsError
from gemma2_fast.quant.bf16 import BF16
from gemma2_fast.quant.fields import packer, unpacker
from gemma2_fast.quant.format import Bytes, Floats, Format

STRIP_ROWS = 64
SCALE_BYTES = 2 * STRIP_ROWS


def strip_format(
    name: str, block_weights: int, code_bytes: int, unpack: Callable[[Bytes], Floats], pack: Callable[[Floats], Bytes]
) -> Format:
    """The record of a format whose blocks are `code_bytes` of codes and then a bfloat16 scale for each of 64 rows.

    unpack: blocks [N, block_bytes] → weights [N, 64, block_weights]; pack: the same backwards.
    """
    weights, block_bytes = STRIP_ROWS * block_weights, code_bytes + SCALE_BYTES

    def unpack_flat(blocks: Bytes) -> Floats:
        return unpack(blocks).reshape(-1, weights)

    def pack_flat(flat: Floats) -> Bytes:
        if not np.isfinite(flat).all():
            raise WeightsError(f"cannot store weights as {name}: one of them is not finite")
        return pack(flat.reshape(-1, STRIP_ROWS, block_weights))

    return Format(
        name,
        block_weights,
        block_bytes,
        gguf_type=None,
        unpack=unpacker(unpack_flat, weights),
        pack=packer(pack_flat, weights, block_bytes),
        last_block_may_be_short=True,
        block_rows=STRIP_ROWS,
    )


def stored_scales(blocks: Bytes) -> NDArray[np.uint16]:
    """The scales behind the codes, the bits of bfloat16, [N, 64]."""
    return np.ascontiguousarray(blocks[:, -SCALE_BYTES:]).view("<u2")


def scales_of(blocks: Bytes) -> Floats:
    """The scales behind the codes, float32 [N, 64, 1]."""
    return BF16.unpack(stored_scales(blocks).view(np.uint8).reshape(-1, 2)).reshape(-1, STRIP_ROWS, 1)


def scale_bytes(scales: Floats) -> Bytes:
    """Scales [N, 64, 1] that bfloat16 holds, as bytes [N, 128]."""
    return (scales.view(np.uint32) >> 16).astype("<u2").reshape(-1, STRIP_ROWS).view(np.uint8)


def in_fours(codes: Bytes) -> Bytes:
    """[N, 64, W] → [N, W / 4, 64, 4]: four codes of a row, then those of the next row."""
    return codes.reshape(len(codes), STRIP_ROWS, codes.shape[2] // 4, 4).swapaxes(1, 2)


def in_rows(fours: Bytes) -> Bytes:
    """The inverse of `in_fours`."""
    return fours.swapaxes(1, 2).reshape(len(fours), STRIP_ROWS, fours.shape[1] * 4)
