"""Token embedding: a row of the table, scaled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.weight_formats import GROUP_COLS


@triton.jit
def embed_kernel(
    token_ids, table, scales, out, width, scale, INT8: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out[t] = table[token_ids[t]] * scale, in float32.

    token_ids [T]; table [V, E], E = width: numbers, or with INT8 codes, and scales [V, E / GROUP, rounded up]; out
    [T, E] float32. Grid: (T, E / BLOCK, rounded up).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    row = tl.load(token_ids + token).to(tl.int64)
    values = tl.load(table + row * width + column, mask=inside, other=0.0).to(tl.float32)
    if INT8:
        of_group = row * tl.cdiv(width, GROUP) + column // GROUP
        values *= tl.load(scales + of_group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, values * scale, mask=inside)


def embed(token_ids: Any, table: Any, scale: float, out: Any, scales: Any = None, block: int = 1024) -> None:
    """token_ids [T] int32; table [V, E], with scales [V, groups] int8 codes; out [T, E] float32."""
    tokens, width = out.shape
    embed_kernel[(tokens, triton.cdiv(width, block))](
        token_ids, table, table if scales is None else scales, out, width, scale,
        INT8=scales is not None, GROUP=GROUP_COLS, BLOCK=block,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    for int8 in (False, True):
        yield Specialisation(
            op="embed",
            kernel=embed_kernel,
            types={
                **{"token_ids": "*i32", "table": "*i8" if int8 else "*bf16", "scales": "*bf16", "out": "*fp32"},
                **{"width": "i32", "scale": "fp32"},
            },
            constants={"INT8": int8, "GROUP": GROUP_COLS, "BLOCK": 1024},
            divisible=frozenset({"width"}),
        )
