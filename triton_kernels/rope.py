"""Rotary embedding of queries and keys, with what lies around it: their norms, and the write to the cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.attention_common import HEAD_SHAPES, PAGE_TOKENS
from gemma2_fast.triton_kernels.dependent_launch import wait_for_predecessor
from gemma2_fast.triton_kernels.specialisation import Specialisation


@triton.jit
def rope_kernel(
    qkv, positions, token_sequence, cos, sin, query_gain, key_gain, pages, num_query_heads, num_kv_heads, block_table,
    table_width, epsilon,
    NORMED: tl.constexpr, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """Queries are turned where they stand; keys, turned, and values go to their slot of the cache.

    qkv [T, H + 2 K, D]; positions, token_sequence [T]; cos, sin [positions, R / 2] float32, PAIRS = R / 2; gains [D];
    pages [N, 2, K, P, D]; block_table [S, table_width]. Pair j is (x_j, x_{j + R / 2}); dims R.. pass through. With
    NORMED queries and keys get RMSNorm first. Computed in float32 and rounded once. Grid: (T, H + 2 K).
    """
    wait_for_predecessor(DEPENDENT)
    token = tl.program_id(0)
    head = tl.program_id(1)
    is_query = head < num_query_heads
    is_value = head >= num_query_heads + num_kv_heads
    row = qkv + (token.to(tl.int64) * (num_query_heads + 2 * num_kv_heads) + head) * HEAD_DIM
    position = tl.load(positions + token)

    pair = tl.arange(0, PAIRS)
    left = tl.load(row + pair).to(tl.float32)
    right = tl.load(row + PAIRS + pair).to(tl.float32)
    REST: tl.constexpr = HEAD_DIM - 2 * PAIRS
    if REST > 0:
        other = 2 * PAIRS + tl.arange(0, REST)
        rest = tl.load(row + other).to(tl.float32)
    if not is_value:
        if NORMED:
            gain = query_gain
            if not is_query:
                gain = key_gain
            squares = tl.sum(left * left) + tl.sum(right * right)
            if REST > 0:
                squares += tl.sum(rest * rest)
            scale = tl.rsqrt(squares / HEAD_DIM + epsilon)
            left = left * scale * (1.0 + tl.load(gain + pair).to(tl.float32))
            right = right * scale * (1.0 + tl.load(gain + PAIRS + pair).to(tl.float32))
            if REST > 0:
                rest = rest * scale * (1.0 + tl.load(gain + other).to(tl.float32))
        c = tl.load(cos + position.to(tl.int64) * PAIRS + pair)
        s = tl.load(sin + position.to(tl.int64) * PAIRS + pair)
        turned = left * c - right * s
        right = right * c + left * s
        left = turned

    out = row
    if not is_query:
        sequence = tl.load(token_sequence + token).to(tl.int64)
        page = tl.load(block_table + sequence * table_width + (position // PAGE) % table_width).to(tl.int64)
        # [N, 2, K, P, D]: keys are heads 0 to K - 1 of a page, values K to 2 K - 1.
        place = page * 2 * num_kv_heads + head - num_query_heads
        out = pages + (place * PAGE + position % PAGE) * HEAD_DIM
    tl.store(out + pair, left.to(pages.dtype.element_ty))
    tl.store(out + PAIRS + pair, right.to(pages.dtype.element_ty))
    if REST > 0:
        tl.store(out + other, rest.to(pages.dtype.element_ty))


def rope(
    qkv: Any, positions: Any, token_sequence: Any, cos: Any, sin: Any, pages: Any, block_table: Any, *,
    query_gain: Any = None, key_gain: Any = None, epsilon: float = 0.0, num_warps: int = 2,
) -> None:  # fmt: skip
    """qkv [T, H + 2 K, D], its queries updated; positions, token_sequence [T] and block_table [S, table_width] int32;
    cos, sin [positions, R / 2] float32; pages [N, 2, K, P, D], written; gains [D] where queries and keys are normed."""
    tokens, heads, head_dim = qkv.shape
    _, _, num_kv_heads, page, _ = pages.shape
    normed = query_gain is not None
    rope_kernel[(tokens, heads)](
        qkv, positions, token_sequence, cos, sin, query_gain if normed else cos, key_gain if normed else cos, pages,
        heads - 2 * num_kv_heads, num_kv_heads, block_table, block_table.shape[1], epsilon,
        NORMED=normed, PAIRS=cos.shape[1], HEAD_DIM=head_dim, PAGE=page, num_warps=num_warps,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    shapes = dict.fromkeys((head_dim, head_dim // 2) for head_dim, _ in HEAD_SHAPES)
    for head_dim, pairs in (*shapes, (256, 64)):  # RecurrentGemma turns half of a head
        for normed in (False, True):
            yield Specialisation(
                op="rope",
                kernel=rope_kernel,
                types={
                    **dict.fromkeys(("qkv", "pages"), "*bf16"),
                    **dict.fromkeys(("positions", "token_sequence", "block_table"), "*i32"),
                    **dict.fromkeys(("cos", "sin", "query_gain", "key_gain"), "*fp32"),
                    **dict.fromkeys(("num_query_heads", "num_kv_heads", "table_width"), "i32"),
                    "epsilon": "fp32",
                },
                constants={"NORMED": normed, "PAIRS": pairs, "HEAD_DIM": head_dim, "PAGE": PAGE_TOKENS},
                num_warps=2,
            )
