"""What the two attention kernels share: how scores become weights, and what is compiled of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.numerics import LOG2_E, tanh
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import Tuned

# Of a wider cap the weights, up to 2^(cap log2 e), would not fit float32 sums; the largest of any Gemma is 50.
WIDEST_CAP = 55.0
PAGE_TOKENS = 64  # P on a GPU: a page of one kv head is one run of 16 or 32 KB
# Head dim and query heads a kv head, of Gemma 1 to 3 and RecurrentGemma.
HEAD_SHAPES = ((256, 1), (256, 2), (256, 4), (256, 8), (256, 10), (256, 16), (128, 2))


@dataclass(frozen=True)
class Heads:
    """What a kernel is compiled for."""

    head_dim: int
    group: int
    capped: bool
    windowed: bool


ALL_HEADS = tuple(
    Heads(*shape, capped, windowed)
    for shape, capped, windowed in itertools.product(HEAD_SHAPES, (False, True), (False, True))
)


@triton.jit
def weigh(scores, seen, maximum, scale, cap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Weights of dot products, the new maximum, and what sums so far are multiplied by."""
    if CAPPED:
        t = tanh(scores * (scale / cap)) * (cap * LOG2_E)
        if MASKED:
            t = tl.where(seen, t, float("-inf"))
        weights, highest, decay = tl.exp2(t), maximum, maximum
    else:
        t = scores * (scale * LOG2_E)
        if MASKED:
            t = tl.where(seen, t, float("-inf"))
        highest = tl.maximum(maximum, tl.max(t, 1))
        # A row that has seen no key yet: minus infinity minus itself would be no number.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(t - reference[:, None])
        decay = tl.exp2(maximum - reference)
    return weights, highest, decay


def checked_cap(cap: float | None) -> float:
    """The cap as kernels take it. ValueError for one that they cannot compute."""
    if cap is not None and not 0 < cap <= WIDEST_CAP:
        raise ValueError(f"attention: the cap must lie between 0 and {WIDEST_CAP}, got {cap}")
    return 1.0 if cap is None else cap


def attention_specialisation(
    op: str, kernel: Any, types: Mapping[str, str], heads: Heads, sizes: Tuned
) -> Specialisation:
    """`types`: of the arguments that the other kernel does not have."""
    return Specialisation(
        op=op,
        kernel=kernel,
        types={
            **dict.fromkeys(("queries", "pages", "out"), "*bf16"),
            **dict.fromkeys(("block_table", "first_token", "context_tokens"), "*i32"),
            **dict.fromkeys(("num_kv_heads", "table_width", "query_stride", "out_stride", "window"), "i32"),
            **dict.fromkeys(("scale", "cap"), "fp32"),
            **types,
        },
        constants={
            **{"CAPPED": heads.capped, "WINDOWED": heads.windowed, "GROUP": heads.group},
            **{"HEAD_DIM": heads.head_dim, "PAGE": PAGE_TOKENS},
            **sizes.constants,
        },
        divisible=frozenset({"query_stride", "out_stride"}),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
