"""The product of a tile of weights and a tile of tokens on the matrix units, which both matmul kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.weight_formats import BF16


@triton.jit
def tile_product(
    x_rows, present, weight, scales, row, rows, cols,
    FORMAT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
    STREAMED: tl.constexpr,
):  # fmt: skip
    """[ROWS, TOKENS] float32: sum over c of weight[row, c] * x_rows[token][c], where a token is present and row < rows.

    Blocks of COLS columns; but for bfloat16 a block is a group, and what it adds is scaled in float32. Weights come
    first, as the matrix units take converted ones from registers there. STREAMED: no other program reads these weights.
    """
    tl.static_assert(FORMAT == BF16 or COLS == GROUP, "a block of columns must be a group")
    columns = tl.arange(0, COLS)
    exists = row < rows
    places = weight + row.to(tl.int64)[:, None] * cols + columns[None, :]
    scale_places = scales + row.to(tl.int64) * tl.cdiv(cols, GROUP)
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    for begin in range(0, cols, COLS):
        inside = begin + columns < cols
        weights = tl.load(
            places + begin, mask=exists[:, None] & inside[None, :], other=0.0,
            eviction_policy="evict_first" if STREAMED else "",
        )  # fmt: skip
        values = tl.load(
            x_rows[None, :] + (begin + columns)[:, None], mask=present[None, :] & inside[:, None], other=0.0,
            eviction_policy="evict_last" if STREAMED else "",
        )  # fmt: skip
        if FORMAT == BF16:
            sums = tl.dot(weights, values, sums)
        else:
            scale = tl.load(scale_places + begin // GROUP, mask=exists, other=0.0).to(tl.float32)
            sums += tl.dot(weights.to(values.dtype), values) * scale[:, None]
    return sums
