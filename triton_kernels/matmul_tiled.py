"""Matrix products of many tokens, bound by the matrix units: tiles of tokens and rows.

Programs that share rows of the matrix run one after another over a few tiles of tokens, then go on to the next rows, so
that what one has read is still in the second-level cache for the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

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

# Tiles of tokens that share what is read of the matrix: of 128 tokens and 9216 columns they are 19 MB, of 50 on sm_90.
NEIGHBOURS = tl.constexpr(8)


@triton.jit
def matmul_tiled_kernel(
    x, weight, scales, factors, bias, out, rows, cols, num_tokens,
    FORMAT: tl.constexpr, BIASED: tl.constexpr, TILE_TOKENS: tl.constexpr, TILE_ROWS: tl.constexpr,
    COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out[t, r] = bias[r] + sum over c of weight[r, c] * x[t, c], summed in float32, rounded once.

    x [T, cols], T = num_tokens; out [T, rows]; weight, scales and factors as FORMAT has them (weight_formats.py), but
    for bfloat16 with COLS = GROUP; with BIASED bias [rows] float32.
    Grid: (T / TILE_TOKENS, rounded up, times rows / TILE_ROWS, rounded up).
    """
    token_tiles = tl.cdiv(num_tokens, TILE_TOKENS)
    row_tiles = tl.cdiv(rows, TILE_ROWS)
    first_tile = tl.program_id(0) // (NEIGHBOURS * row_tiles) * NEIGHBOURS
    neighbours = tl.minimum(token_tiles - first_tile, NEIGHBOURS)
    place = tl.program_id(0) % (NEIGHBOURS * row_tiles)
    token = (first_tile + place % neighbours) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    row = place // neighbours * TILE_ROWS + tl.arange(0, TILE_ROWS)
    present = token < num_tokens
    sums = tile_product(
        x + token.to(tl.int64) * cols, present, weight, scales, factors, row, rows, cols,
        FORMAT, TILE_TOKENS, TILE_ROWS, COLS, GROUP, False, False,
    )  # fmt: skip
    if BIASED:
        sums += tl.load(bias + row, mask=row < rows, other=0.0)[:, None]
    places = out + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(places, sums.to(out.dtype.element_ty), mask=present[None, :] & (row < rows)[:, None])


def matmul_tiled(
    x: Any, weight: Any, out: Any, scales: Any = None, factors: Any = None, *, bias: Any = None, tile_tokens: int = 128,
    tile_rows: int = 128, cols: int = 64, num_warps: int = 8, num_stages: int = 3,
) -> None:  # fmt: skip
    """x [T, cols]; weight, scales and factors (weight_formats.py) of [rows, cols]; bias (or None) [rows] float32; out
    [T, rows].

    cols: of a block. Contiguous tensors on one device.
    """
    num_tokens, num_rows = out.shape
    tiles = triton.cdiv(num_tokens, tile_tokens) * triton.cdiv(num_rows, tile_rows)
    matmul_tiled_kernel[(tiles,)](
        x, weight, x if scales is None else scales, x if factors is None else factors, x if bias is None else bias, out,
        num_rows, x.shape[1], num_tokens, FORMAT=format_of(scales, factors), BIASED=bias is not None,
        TILE_TOKENS=tile_tokens, TILE_ROWS=tile_rows, COLS=cols, GROUP=GROUP_COLS, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    for code, biased in itertools.product(FORMATS, (False, True)):
        sizes = tuned("matmul_tiled", arch, format=code)
        yield Specialisation(
            op="matmul_tiled",
            kernel=matmul_tiled_kernel,
            types={
                **{"x": "*bf16", "weight": WEIGHT_TYPES[code], "scales": SCALE_TYPE, "factors": FACTOR_TYPE},
                **{"bias": "*fp32", "out": "*bf16", **dict.fromkeys(("rows", "cols", "num_tokens"), "i32")},
            },
            constants={"FORMAT": code, "BIASED": biased, "GROUP": GROUP_COLS, **sizes.constants},
            divisible=frozenset({"rows", "cols"}),
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
