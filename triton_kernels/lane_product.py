"""The product of some rows of weights and one token on lanes, without the matrix units: few operations a weight."""

from __future__ import annotations

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.dependent_launch import wait_for_predecessor
from gemma2_fast.triton_kernels.weight_formats import BF16, INT4, INT8


@triton.jit
def lane_product(
    x, weight, scales, factors, row, rows, cols,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """[ROWS] float32: sum over c of weight[row, c] * x[c], where row < rows. A program walks in blocks of COLS columns.

    A thread adds up what it loads at once, 16 bytes of weights, then scales the sum: a tile of scales has one number a
    group. Lanes meet at the end. Each block is loaded while the one before is added up, the first before the wait.
    """
    if FORMAT == INT4:
        sums = _nibbles(x, weight, scales, factors, row, rows, cols, ROWS, COLS, GROUP, DEPENDENT)
    else:
        sums = _numbers(x, weight, scales, row, rows, cols, FORMAT, ROWS, COLS, GROUP, DEPENDENT)
    return tl.sum(tl.sum(sums, 2), 1)


@triton.jit
def _numbers(
    x, weight, scales, row, rows, cols,
    FORMAT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """[ROWS, SPANS, LANES]: of the groups of a block, of bfloat16 of the block as one."""
    SPAN: tl.constexpr = COLS if FORMAT == BF16 else GROUP
    SPANS: tl.constexpr = COLS // SPAN
    CHUNK: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
    LANES: tl.constexpr = SPAN // CHUNK
    span = tl.arange(0, SPANS)
    lane = tl.arange(0, LANES)
    first = (span * SPAN)[:, None] + (lane * CHUNK)[None, :]
    column = first[:, :, None] + tl.arange(0, CHUNK)[None, None, :]
    present = row < rows
    places = weight + row.to(tl.int64)[:, None, None, None] * cols + column[None, :, :, :]
    groups = tl.cdiv(cols, GROUP)
    scale_places = scales + row.to(tl.int64)[:, None] * groups + span[None, :]
    sums = tl.zeros([ROWS, SPANS, LANES], tl.float32)
    next_weights = _streamed(places, present[:, None, None, None] & (column < cols)[None, :, :, :])
    if FORMAT == INT8:
        next_scale = tl.load(scale_places, mask=present[:, None] & (span < groups)[None, :], other=0.0)
    wait_for_predecessor(DEPENDENT)
    for begin in range(0, cols, COLS):
        weights, later = next_weights.to(tl.float32), begin + COLS
        next_weights = _streamed(places + later, present[:, None, None, None] & (later + column < cols)[None, :, :, :])
        if FORMAT == INT8:
            scale = next_scale.to(tl.float32)
            of_group = present[:, None] & (later // GROUP + span < groups)[None, :]
            next_scale = tl.load(scale_places + later // GROUP, mask=of_group, other=0.0)
        values = tl.load(x + begin + column, mask=begin + column < cols, other=0.0, eviction_policy="evict_last")
        products = tl.sum(weights * values.to(tl.float32)[None, :, :, :], 3)
        if FORMAT == INT8:
            products *= scale[:, :, None]
        sums += products
    return sums


@triton.jit
def _streamed(places, mask):
    return tl.load(places, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def _code(words, BYTE: tl.constexpr, HIGH: tl.constexpr):
    """code - 8 of a nibble of each word, times UNIT = 16^(its place in the half word), which costs no shift: its bits
    become some of the last of a float32 of 2^23 and more."""
    UNIT: tl.constexpr = 16 ** (2 * (BYTE % 2) + HIGH)
    MASK: tl.constexpr = 15 * UNIT
    nibbles = ((words >> (16 * (BYTE // 2))) & MASK) | 0x4B000000
    return nibbles.to(tl.float32, bitcast=True) - (8388608.0 + 8.0 * UNIT)


@triton.jit
def _nibbles(
    x, weight, scales, factors, row, rows, cols,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """The same of int4: [ROWS, SPANS, 4], four loads of four words a group, each with two factors."""
    tl.static_assert(GROUP == 128, "a group must be 64 bytes")
    SPANS: tl.constexpr = COLS // GROUP
    WORDS: tl.constexpr = GROUP // 8
    span = tl.arange(0, SPANS)
    lane = tl.arange(0, 4)
    quad = tl.arange(0, 4)
    pair = tl.arange(0, 2)
    words = (lane * 4)[None, :, None] + quad[None, None, :] + (span * WORDS)[:, None, None]
    # Of a word the bytes are four columns, in the order (second half of the word, second byte of that half).
    byte = (pair * 2)[:, None] + pair[None, :]
    first = (span * GROUP)[:, None, None] + (lane * 16)[None, :, None] + (quad * 4)[None, None, :]
    column = first[:, :, :, None, None] + byte[None, None, None, :, :]
    present = row < rows
    groups = tl.cdiv(cols, GROUP)
    first_group = row.to(tl.int64) * groups
    places = weight.to(tl.pointer_type(tl.int32)) + first_group[:, None, None, None] * WORDS + words[None, :, :, :]
    group_places = first_group[:, None] + span[None, :]
    scale_places = scales + group_places
    factor_places = factors.to(tl.pointer_type(tl.int16)) + group_places
    sums = tl.zeros([ROWS, SPANS, 4], tl.float32)
    of_group = present[:, None] & (span < groups)[None, :]
    next_codes = _streamed(places, of_group[:, :, None, None])
    next_scale = tl.load(scale_places, mask=of_group, other=0.0)
    next_factor = tl.load(factor_places, mask=of_group, other=0)
    wait_for_predecessor(DEPENDENT)
    for begin in range(0, cols, COLS):
        codes, scale = next_codes, next_scale.to(tl.float32)
        factor = next_factor.to(tl.int32)[:, :, None] >> (8 * (lane // 2))[None, None, :]
        group = begin // GROUP + SPANS
        of_group = present[:, None] & (group + span < groups)[None, :]
        next_codes = _streamed(places + group * WORDS, of_group[:, :, None, None])
        next_scale = tl.load(scale_places + group, mask=of_group, other=0.0)
        next_factor = tl.load(factor_places + group, mask=of_group, other=0)
        low = _half(x + begin, column, cols - begin, codes, False)
        high = _half(x + begin + GROUP // 2, column, cols - begin - GROUP // 2, codes, True)
        low *= ((factor & 15) - 8).to(tl.float32)
        high *= (((factor >> 4) & 15) - 8).to(tl.float32)
        sums += (low + high) * scale[:, :, None]
    return sums


@triton.jit
def _half(x, column, end, words, HIGH: tl.constexpr):
    """[ROWS, SPANS, 4]: sums of low or high nibbles times the columns that they belong to."""
    values = tl.load(x + column, mask=column < end, other=0.0, eviction_policy="evict_last").to(tl.float32)
    even, odd = tl.split(values)
    byte0, byte2 = tl.split(even)
    byte1, byte3 = tl.split(odd)
    UNIT: tl.constexpr = 16**HIGH
    products = _code(words, 0, HIGH) * (byte0 * (1.0 / UNIT))[None, :, :, :]
    products += _code(words, 1, HIGH) * (byte1 * (1.0 / (256 * UNIT)))[None, :, :, :]
    products += _code(words, 2, HIGH) * (byte2 * (1.0 / UNIT))[None, :, :, :]
    products += _code(words, 3, HIGH) * (byte3 * (1.0 / (256 * UNIT)))[None, :, :, :]
    return tl.sum(products, 3)
