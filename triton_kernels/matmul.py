"""Matrix products of one to sixteen tokens, bound by how fast the weights are read.

A program has some rows of the matrix and walks along them; sums are kept in float32, in an order that depends on the
block sizes alone. With GEGLU the matrix holds the rows of gate and then of up, and a program has the same rows of both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.lane_product import lane_product
from gemma2_fast.triton_kernels.numerics import gelu_tanh
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tile_product import tile_product
from gemma2_fast.triton_kernels.tuning import tuned
from gemma2_fast.triton_kernels.weight_formats import (
    FACTOR_TYPE,
    FORMATS,
    GROUP_COLS,
    SCALE_TYPE,
    WEIGHT_TYPES,
    format_of,
)

MOST_TOKENS = 16


@triton.jit
def _sums(
    x_rows, present, weight, scales, factors, row, rows, cols,
    FORMAT: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """[ROWS, TOKENS] float32."""
    if TOKENS == 1:
        sums = lane_product(
            x_rows, weight, scales, factors, row, rows, cols, FORMAT, ROWS, COLS, GROUP, DEPENDENT
        )[:, None]  # fmt: skip
    else:
        sums = tile_product(
            x_rows, present, weight, scales, factors, row, rows, cols,
            FORMAT, TOKENS, ROWS, COLS, GROUP, True, DEPENDENT,
        )  # fmt: skip
    return sums


@triton.jit
def matmul_kernel(
    x, row_index, weight, scales, factors, bias, out, rows, cols, num_tokens,
    FORMAT: tl.constexpr, BIASED: tl.constexpr, GEGLU: tl.constexpr, GATHER: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """out[t, r] = bias[r] + sum over c of weight[r, c] * x[t, c]; with GEGLU gelu_tanh(that of row r) * that of row
    rows + r.

    x [T, cols], T = num_tokens <= TOKENS, which is 1 or at least 16; with GATHER x has any number of rows, and
    row_index [T] says which to take. out [T, rows]; weight, scales and factors as FORMAT has them (weight_formats.py),
    and with BIASED bias [rows] float32, of twice as many rows with GEGLU. But for bfloat16 COLS holds whole groups,
    with several tokens just one. Rounded once. row_index is read before the wait: no kernel of the chain may write it.
    Grid: (rows / ROWS, rounded up).
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    present = token < num_tokens
    if TOKENS == 1:
        x_rows = x
        if GATHER:
            x_rows += tl.load(row_index).to(tl.int64) * cols
    else:
        x_row = token
        if GATHER:
            x_row = tl.load(row_index + token, mask=present, other=0)
        x_rows = x + x_row.to(tl.int64) * cols
    values = _sums(
        x_rows, present, weight, scales, factors, row, rows, cols, FORMAT, TOKENS, ROWS, COLS, GROUP, DEPENDENT
    )  # fmt: skip
    if BIASED:
        values += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    if GEGLU:
        up = _sums(
            x_rows, present, weight, scales, factors, rows + row, 2 * rows, cols,
            FORMAT, TOKENS, ROWS, COLS, GROUP, False,
        )  # fmt: skip
        if BIASED:
            up += tl.load(bias + rows + row, mask=row < rows, other=0.0)[:, None]
        values = gelu_tanh(values) * up
    places = out + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(places, values.to(out.dtype.element_ty), mask=present[None, :] & (row < rows)[:, None])


def matmul(
    x: Any, weight: Any, out: Any, scales: Any = None, factors: Any = None, *, bias: Any = None, geglu: bool = False,
    row_index: Any = None, rows: int = 8, cols: int = 512, num_warps: int = 4, num_stages: int = 3,
) -> None:  # fmt: skip
    """x [T, cols], T <= 16, or any number of rows, of which row_index [T] int32 says which to take; out [T, rows];
    weight, scales and factors (weight_formats.py) and bias (or None) float32 of as many rows, with GEGLU of twice as
    many.

    rows and cols: of a block. Contiguous tensors on one device.
    """
    num_tokens, num_rows = out.shape
    if num_tokens > MOST_TOKENS:
        raise ValueError(f"matmul: at most {MOST_TOKENS} tokens at once, got {num_tokens}")
    matmul_kernel[(triton.cdiv(num_rows, rows),)](
        x, x if row_index is None else row_index, weight, x if scales is None else scales,
        x if factors is None else factors, x if bias is None else bias, out, num_rows, x.shape[1], num_tokens,
        FORMAT=format_of(scales, factors), BIASED=bias is not None, GEGLU=geglu, GATHER=row_index is not None,
        TOKENS=1 if num_tokens == 1 else MOST_TOKENS, ROWS=rows, COLS=cols, GROUP=GROUP_COLS, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


# Of BIASED, GEGLU and GATHER, and the type of the result: plain products, those of gate and up, and the output head.
PURPOSES = (
    *((biased, geglu, False, "*bf16") for biased in (False, True) for geglu in (False, True)),
    (False, False, True, "*fp32"),
)


def specialisations(arch: int) -> Iterator[Specialisation]:
    for code, tokens, (biased, geglu, gather, out) in itertools.product(FORMATS, (1, MOST_TOKENS), PURPOSES):
        sizes = tuned("matmul", arch, tokens=tokens, format=code)
        yield Specialisation(
            op="matmul",
            kernel=matmul_kernel,
            types={
                **{"x": "*bf16", "row_index": "*i32", "weight": WEIGHT_TYPES[code], "scales": SCALE_TYPE},
                **{"factors": FACTOR_TYPE, "bias": "*fp32", "out": out},
                **dict.fromkeys(("rows", "cols", "num_tokens"), "i32"),
            },
            constants={
                **{"FORMAT": code, "BIASED": biased, "GEGLU": geglu, "GATHER": gather, "TOKENS": tokens},
                "GROUP": GROUP_COLS,
                **sizes.constants,
            },
            divisible=frozenset({"rows", "cols"}),
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
