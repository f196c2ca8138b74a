"""Token embedding: a row of the table, scaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.dependent_launch import wait_for_predecessor
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.weight_formats import (
    BF16,
    FACTOR_TYPE,
    FORMATS,
    GROUP_COLS,
    INT4,
    SCALE_TYPE,
    WEIGHT_TYPES,
    format_of,
)


@triton.jit
def embed_kernel(
    token_ids, chosen, table, scales, factors, out, width, scale,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """out[t] = table[token_ids[t]] * scale, in float32.

    token_ids [T]; chosen [L]: tokens that the step before chose, where -1 - l among the ids means row l. A negative
    number there, where it chose none, counts as token 0: nobody reads the result. table [V, E], E = width, scales and
    factors as FORMAT has them (weight_formats.py); out [T, E] float32. Grid: (T, E / BLOCK, rounded up).
    """
    wait_for_predecessor(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    token_id = tl.load(token_ids + token)
    token_id = tl.load(chosen - 1 - token_id, mask=token_id < 0, other=token_id)
    row = tl.maximum(token_id, 0).to(tl.int64)
    of_group = row * tl.cdiv(width, GROUP) + column // GROUP
    if FORMAT == INT4:
        HALF: tl.constexpr = GROUP // 2
        shift = column % GROUP // HALF * 4
        codes = tl.load(table + of_group * HALF + column % HALF, mask=inside, other=0).to(tl.int32)
        pairs = tl.load(factors + of_group * 2 + column % HALF // 32, mask=inside, other=0).to(tl.int32)
        values = ((((codes >> shift) & 15) - 8) * (((pairs >> shift) & 15) - 8)).to(tl.float32)
    else:
        values = tl.load(table + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if FORMAT != BF16:
        values *= tl.load(scales + of_group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, values * scale, mask=inside)


def embed(
    token_ids: Any, table: Any, scale: float, out: Any, scales: Any = None, factors: Any = None, chosen: Any = None,
    block: int = 1024,
) -> None:  # fmt: skip
    """token_ids [T], chosen [L] int32; table, scales and factors (weight_formats.py) of [V, E]; out [T, E] float32."""
    tokens, width = out.shape
    embed_kernel[(tokens, triton.cdiv(width, block))](
        token_ids, token_ids if chosen is None else chosen, table, table if scales is None else scales,
        table if factors is None else factors, out, width, scale,
        FORMAT=format_of(scales, factors), GROUP=GROUP_COLS, BLOCK=block,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    for code in FORMATS:
        yield Specialisation(
            op="embed",
            kernel=embed_kernel,
            types={
                **dict.fromkeys(("token_ids", "chosen"), "*i32"),
                **{"table": WEIGHT_TYPES[code], "scales": SCALE_TYPE, "factors": FACTOR_TYPE},
                **{"out": "*fp32", "width": "i32", "scale": "fp32"},
            },
            constants={"FORMAT": code, "GROUP": GROUP_COLS, "BLOCK": 1024},
            divisible=frozenset({"width"}),
        )
