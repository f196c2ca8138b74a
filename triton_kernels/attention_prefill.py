"""Attention of many queries at once over a paged cache: ragged batches, soft cap, sliding window, grouped queries.

A program has a tile of queries of one sequence and one kv head, the heads of the group side by side, so that each key
is read once for all of them. It walks over blocks of keys: those that only some of its queries see carry a mask, those
between do not, and those that none sees are never visited.

With a cap the scores are bounded, so a weight is 2^t itself, t = log2(e) * score: no maximum is kept, and nothing that
was summed is ever rescaled. Without one the maximum runs along.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.attention_common import ALL_HEADS, attention_specialisation, checked_cap, weigh
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import tuned


@triton.jit
def _walk(
    sums, denominator, maximum, queries, positions, head_keys, head_values, page_stride, table, table_width,
    begin, end, first_key, end_key, scale, cap, window,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the keys of blocks [begin, end). Of them [first_key, end_key) exist for this tile."""
    dims = tl.arange(0, HEAD_DIM)
    slots = tl.arange(0, BLOCK)
    for block in range(begin, end):
        first = block * BLOCK
        page = tl.load(table + (first // PAGE) % table_width).to(tl.int64)
        place = page * page_stride + (first % PAGE) * HEAD_DIM
        key = tl.load(head_keys + place + slots[None, :] * HEAD_DIM + dims[:, None])
        scores = tl.dot(queries, key)
        keys = first + slots
        seen = keys[None, :] <= positions[:, None]
        if WINDOWED:
            seen = seen & (keys[None, :] > positions[:, None] - window)
        weights, maximum, decay = weigh(scores, seen, maximum, scale, cap, CAPPED, MASKED)
        values = head_values + place + slots[:, None] * HEAD_DIM + dims[None, :]
        if MASKED:  # slots that no token was written to may hold NaN
            value = tl.load(values, mask=((keys >= first_key) & (keys < end_key))[:, None], other=0.0)
        else:
            value = tl.load(values)
        if CAPPED:
            denominator += tl.sum(weights, 1)
        else:
            denominator = denominator * decay + tl.sum(weights, 1)
            sums = sums * decay[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums)
    return sums, denominator, maximum


@triton.jit
def attention_prefill_kernel(
    queries, pages, num_kv_heads, block_table, table_width, first_token, context_tokens, tiles, out,
    query_stride, out_stride, scale, cap, window,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t, h] = sum over s of softmax(mask(cap(scale * queries[t, h] . key[s]))) * value[s].

    queries, out: rows of H * D, query_stride and out_stride apart; pages [N, 2, K, P, D]; block_table [S, table_width];
    first_token [S + 1]; context_tokens [S]: keys before the step's; tiles [number, 2]: sequence, first query of it.
    cap <= WIDEST_CAP; K = num_kv_heads, G = GROUP, P = PAGE; TILE rows, a query and a head each, a program.
    Grid: (tiles, K).
    """
    tl.static_assert(PAGE % BLOCK == 0, "a block of keys must not cross pages")
    tl.static_assert(TILE >= GROUP, "a tile must hold the heads of a query")
    sequence = tl.load(tiles + 2 * tl.program_id(0))
    first = tl.load(tiles + 2 * tl.program_id(0) + 1)
    kv_head = tl.program_id(1)
    begin = tl.load(first_token + sequence)
    num_queries = tl.load(first_token + sequence + 1) - begin
    context = tl.load(context_tokens + sequence)
    table = block_table + sequence.to(tl.int64) * table_width

    row = tl.arange(0, TILE)
    query = first + row // GROUP
    present = (row < TILE // GROUP * GROUP) & (query < num_queries)
    dims = tl.arange(0, HEAD_DIM)
    token = (begin + query).to(tl.int64)
    head = (kv_head * GROUP + row % GROUP) * HEAD_DIM
    tile = tl.load(queries + (token * query_stride + head)[:, None] + dims[None, :], mask=present[:, None], other=0.0)
    positions = context + query

    lowest = context + first
    highest = context + tl.minimum(first + TILE // GROUP, num_queries) - 1
    end_key = highest + 1
    first_key = 0
    whole_begin = 0
    if WINDOWED:
        first_key = tl.maximum(lowest - window + 1, 0)
        # From here on every query sees the keys that are not after it.
        whole_begin = tl.cdiv(tl.maximum(highest - window + 1, 0), BLOCK)
    first_block = first_key // BLOCK
    end_block = tl.cdiv(end_key, BLOCK)
    whole_end = (lowest + 1) // BLOCK
    left_end = tl.minimum(tl.maximum(whole_begin, first_block), end_block)
    right_begin = tl.maximum(left_end, whole_end)

    # [N, 2, K, P, D]: a page's keys of all heads, then its values.
    page_stride = 2 * num_kv_heads * (PAGE * HEAD_DIM)
    head_keys = pages + kv_head * (PAGE * HEAD_DIM)
    head_values = head_keys + num_kv_heads * (PAGE * HEAD_DIM)
    sums = tl.zeros([TILE, HEAD_DIM], tl.float32)
    denominator = tl.zeros([TILE], tl.float32)
    maximum = tl.full([TILE], float("-inf"), tl.float32)
    if WINDOWED:
        sums, denominator, maximum = _walk(
            sums, denominator, maximum, tile, positions, head_keys, head_values, page_stride, table, table_width,
            first_block, left_end, first_key, end_key, scale, cap, window,
            CAPPED, WINDOWED, True, HEAD_DIM, PAGE, BLOCK,
        )  # fmt: skip
    sums, denominator, maximum = _walk(
        sums, denominator, maximum, tile, positions, head_keys, head_values, page_stride, table, table_width,
        left_end, right_begin, first_key, end_key, scale, cap, window, CAPPED, WINDOWED, False, HEAD_DIM, PAGE, BLOCK,
    )  # fmt: skip
    sums, denominator, maximum = _walk(
        sums, denominator, maximum, tile, positions, head_keys, head_values, page_stride, table, table_width,
        right_begin, end_block, first_key, end_key, scale, cap, window, CAPPED, WINDOWED, True, HEAD_DIM, PAGE, BLOCK,
    )  # fmt: skip
    denominator = tl.where(present, denominator, 1.0)
    places = out + (token * out_stride + head)[:, None] + dims[None, :]
    tl.store(places, (sums / denominator[:, None]).to(out.dtype.element_ty), mask=present[:, None])


def prefill_tiles(lengths: Sequence[tuple[int, int]], group_heads: int, tile: int) -> list[tuple[int, int]]:
    """The tiles of ragged sequences, (sequence, first query), from (tokens in the cache, new ones) of each.

    The longest walks come first.
    """
    queries = tile // group_heads
    tiles = [(s, first) for s, (_, count) in enumerate(lengths) for first in range(0, count, queries)]
    return sorted(tiles, key=lambda tile: -lengths[tile[0]][0] - tile[1])


def attention_prefill(
    queries: Any, pages: Any, block_table: Any, first_token: Any, context_tokens: Any, tiles: Any, out: Any, *,
    query_scale: float, score_softcap: float | None, window_keys: int | None,
    tile: int = 128, block: int = 64, num_warps: int = 8, num_stages: int = 2,
) -> None:  # fmt: skip
    """queries, out [T, H, D]; pages [N, 2, K, P, D]; block_table [S, table_width], first_token [S + 1],
    context_tokens [S] and tiles [number, 2] (prefill_tiles) int32. Only tokens of queries and out may lie apart."""
    _, heads, head_dim = queries.shape
    _, _, num_kv_heads, page, _ = pages.shape
    attention_prefill_kernel[(tiles.shape[0], num_kv_heads)](
        queries, pages, num_kv_heads, block_table, block_table.shape[1], first_token, context_tokens, tiles, out,
        queries.stride(0), out.stride(0), query_scale, checked_cap(score_softcap), window_keys or 0,
        CAPPED=score_softcap is not None, WINDOWED=window_keys is not None, GROUP=heads // num_kv_heads,
        HEAD_DIM=head_dim, PAGE=page, TILE=tile, BLOCK=block, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    for heads in ALL_HEADS:
        sizes = tuned("attention_prefill", arch, head_dim=heads.head_dim)
        yield attention_specialisation("attention_prefill", attention_prefill_kernel, {"tiles": "*i32"}, heads, sizes)
