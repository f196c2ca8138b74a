"""The product of a tile of weights and a tile of tokens on the matrix units, which both matmul kernels share."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.dependent_launch import wait_for_predecessor
from gemma2_fast.triton_kernels.weight_formats import BF16, INT4


@triton.jit
def tile_product(
    x_rows, present, weight, scales, factors, row, rows, cols,
    FORMAT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
    STREAMED: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """[ROWS, TOKENS] float32: sum over c of weight[row, c] * x_rows[token][c], where a token is present and row < rows.

    Blocks of COLS columns; but for bfloat16 a block is a group, and what it adds is scaled in float32. Weights come
    first, as the matrix units take converted ones from registers there. STREAMED: no other program reads these weights.
    DEPENDENT: the weights of the first block are loaded before the wait.
    """
    tl.static_assert(FORMAT == BF16 or COLS == GROUP, "a block of columns must be a group")
    sums = tl.zeros([ROWS, TOKENS], tl.float32)
    first = 0
    if DEPENDENT:
        first = COLS
        block = _block(weight, scales, factors, row, rows, cols, 0, FORMAT, COLS, GROUP, STREAMED)
        wait_for_predecessor(DEPENDENT)
        sums = _added(sums, block, x_rows, present, cols, 0, FORMAT, COLS, GROUP, STREAMED)
    for begin in range(first, cols, COLS):
        block = _block(weight, scales, factors, row, rows, cols, begin, FORMAT, COLS, GROUP, STREAMED)
        sums = _added(sums, block, x_rows, present, cols, begin, FORMAT, COLS, GROUP, STREAMED)
    return sums


@triton.jit
def _block(
    weight, scales, factors, row, rows, cols, begin,
    FORMAT: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    """Numbers or codes, the second half of a group's apart if they are int4, and scales."""
    group = row.to(tl.int64) * tl.cdiv(cols, GROUP) + begin // GROUP
    if FORMAT == INT4:
        codes, others = _codes(weight, factors, group, row < rows, GROUP // 2, STREAMED)
    else:
        codes = _numbers(weight, row, rows, cols, begin, COLS, STREAMED)
        others = codes
    scale = 1.0
    if FORMAT != BF16:
        scale = tl.load(scales + group, mask=row < rows, other=0.0)
    return codes, others, scale


@triton.jit
def _added(
    sums, block, x_rows, present, cols, begin,
    FORMAT: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, STREAMED: tl.constexpr,
):  # fmt: skip
    codes, others, scale = block
    HALF: tl.constexpr = GROUP // 2
    values = _values(x_rows, present, cols, begin, HALF if FORMAT == INT4 else COLS, STREAMED)
    if FORMAT == BF16:
        sums = tl.dot(codes, values, sums)
    else:
        products = tl.dot(codes.to(values.dtype), values)
        if FORMAT == INT4:
            values = _values(x_rows, present, cols, begin + HALF, HALF, STREAMED)
            products = tl.dot(others.to(values.dtype), values, products)
        sums += products * scale.to(tl.float32)[:, None]
    return sums


@triton.jit
def _values(x_rows, present, cols, begin, COLS: tl.constexpr, STREAMED: tl.constexpr):
    """[COLS, TOKENS]"""
    column = begin + tl.arange(0, COLS)
    return tl.load(
        x_rows[None, :] + column[:, None], mask=present[None, :] & (column < cols)[:, None], other=0.0,
        eviction_policy="evict_last" if STREAMED else "",
    )  # fmt: skip


@triton.jit
def _numbers(weight, row, rows, cols, begin, COLS: tl.constexpr, STREAMED: tl.constexpr):
    """[ROWS, COLS], as they are stored."""
    column = begin + tl.arange(0, COLS)
    places = weight + row.to(tl.int64)[:, None] * cols + column[None, :]
    return tl.load(
        places, mask=(row < rows)[:, None] & (column < cols)[None, :], other=0.0,
        eviction_policy="evict_first" if STREAMED else "",
    )  # fmt: skip


@triton.jit
def _codes(weight, factors, group, exists, BYTES: tl.constexpr, STREAMED: tl.constexpr):
    """factor * (code - 8) of the two halves of a group, each [ROWS, BYTES] int8: integers that bfloat16 holds."""
    pair = tl.arange(0, 2)
    places = (pair * (BYTES // 2))[:, None] + tl.arange(0, BYTES // 2)[None, :]
    packed = tl.load(
        weight + group[:, None, None] * BYTES + places[None, :, :], mask=exists[:, None, None], other=0,
        eviction_policy="evict_first" if STREAMED else "",
    )  # fmt: skip
    factor = tl.load(factors + group[:, None] * 2 + pair[None, :], mask=exists[:, None], other=0)[:, :, None]
    low = ((packed & 15).to(tl.int8) - 8) * ((factor & 15).to(tl.int8) - 8)
    high = ((packed >> 4).to(tl.int8) - 8) * ((factor >> 4).to(tl.int8) - 8)
    return tl.reshape(low, [group.shape[0], BYTES]), tl.reshape(high, [group.shape[0], BYTES])
