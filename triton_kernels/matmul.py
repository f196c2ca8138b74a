"""Matrix products of one to sixteen tokens, bound by how fast the weights are read.

A program has some rows of the matrix and walks along them; sums are kept in float32, in an order that depends on the
block sizes alone. With GEGLU the matrix holds the rows of gate and then of up, and a program has the same rows of both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.numerics import gelu_tanh
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import tuned

GROUP_COLS = 128  # columns that share a scale
MOST_TOKENS = 16


@triton.jit
def _scales(scales, row, column, cols, inside, GROUP: tl.constexpr):
    place = row.to(tl.int64) * tl.cdiv(cols, GROUP) + column // GROUP
    return tl.load(scales + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sums(x, weight, scales, row, rows, cols, num_tokens, INT8: tl.constexpr, TOKENS: tl.constexpr,
          ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """[TOKENS, ROWS] float32. One token: lanes add up along the rows and meet at the end. More: on the matrix units."""
    columns = tl.arange(0, COLS)
    token = tl.arange(0, TOKENS)
    places = weight + row.to(tl.int64)[:, None] * cols + columns[None, :]
    lanes = tl.zeros([ROWS, COLS], tl.float32)
    sums = tl.zeros([TOKENS, ROWS], tl.float32)
    for begin in range(0, cols, COLS):
        column = begin + columns
        inside = (row[:, None] < rows) & (column[None, :] < cols)
        weights = tl.load(places + begin, mask=inside, other=0.0, eviction_policy="evict_first")
        if TOKENS == 1:
            values = tl.load(x + column, mask=column < cols, other=0.0, eviction_policy="evict_last").to(tl.float32)
            products = weights.to(tl.float32) * values[None, :]
            if INT8:
                products *= _scales(scales, row[:, None], column[None, :], cols, inside, GROUP)
            lanes += products
        else:
            present = (token[:, None] < num_tokens) & (column[None, :] < cols)
            values = tl.load(
                x + token[:, None] * cols + column[None, :], mask=present, other=0.0, eviction_policy="evict_last"
            )
            products = tl.dot(values, tl.trans(weights.to(values.dtype)))
            if INT8:  # a block of columns is a group
                products *= _scales(scales, row, begin, cols, row < rows, GROUP)[None, :]
            sums += products
    if TOKENS == 1:
        sums = tl.sum(lanes, 1)[None, :]
    return sums


@triton.jit
def matmul_kernel(
    x, weight, scales, out, rows, cols, num_tokens,
    INT8: tl.constexpr, GEGLU: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """out[t, r] = sum over c of weight[r, c] * x[t, c]; with GEGLU gelu_tanh(that of row r) * that of row rows + r.

    x [T, cols], T = num_tokens <= TOKENS, which is 1 or at least 16; out [T, rows]; weight [rows, cols], twice as many
    rows with GEGLU. INT8: codes, with scales [rows, cols / GROUP, rounded up]; several tokens need COLS = GROUP then.
    Rounded once.
    Grid: (rows / ROWS, rounded up).
    """
    tl.static_assert(TOKENS == 1 or not INT8 or COLS == GROUP, "a block of columns must be a group")
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    values = _sums(x, weight, scales, row, rows, cols, num_tokens, INT8, TOKENS, ROWS, COLS, GROUP)
    if GEGLU:
        up = _sums(x, weight, scales, rows + row, 2 * rows, cols, num_tokens, INT8, TOKENS, ROWS, COLS, GROUP)
        values = gelu_tanh(values) * up
    token = tl.arange(0, TOKENS)
    present = (token[:, None] < num_tokens) & (row[None, :] < rows)
    tl.store(out + token[:, None] * rows + row[None, :], values.to(out.dtype.element_ty), mask=present)


def matmul(
    x: Any, weight: Any, out: Any, scales: Any = None, *, geglu: bool = False, rows: int = 8, cols: int = 512,
    num_warps: int = 4, num_stages: int = 3,
) -> None:  # fmt: skip
    """x [T, cols], T <= 16; weight [rows or 2 rows, cols], with scales [rows or 2 rows, groups] int8 codes; out
    [T, rows].

    rows and cols: of a block. Contiguous tensors on one device.
    """
    num_tokens, width = x.shape
    num_rows = out.shape[1]
    if num_tokens > MOST_TOKENS:
        raise ValueError(f"matmul: at most {MOST_TOKENS} tokens at once, got {num_tokens}")
    matmul_kernel[(triton.cdiv(num_rows, rows),)](
        x, weight, x if scales is None else scales, out, num_rows, width, num_tokens,
        INT8=scales is not None, GEGLU=geglu, TOKENS=1 if num_tokens == 1 else MOST_TOKENS, ROWS=rows, COLS=cols,
        GROUP=GROUP_COLS, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    for int8 in (False, True):
        for geglu in (False, True):
            for tokens in (1, MOST_TOKENS):
                sizes = tuned("matmul", arch, tokens=tokens, int8=int8)
                yield Specialisation(
                    op="matmul",
                    kernel=matmul_kernel,
                    types={
                        **{"x": "*bf16", "weight": "*i8" if int8 else "*bf16", "scales": "*bf16", "out": "*bf16"},
                        **dict.fromkeys(("rows", "cols", "num_tokens"), "i32"),
                    },
                    constants={
                        "INT8": int8, "GEGLU": geglu, "TOKENS": tokens, "GROUP": GROUP_COLS, **sizes.constants,
                    },
                    divisible=frozenset({"rows", "cols"}),
                    num_warps=sizes.num_warps,
                    num_stages=sizes.num_stages,
                )  # fmt: skip
