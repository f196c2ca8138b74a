"""Attention of few queries a sequence over a paged cache, the keys of a sequence split among programs.

Memory bounds it, so the queries of all heads that share a kv head, and all queries of a sequence, are rows of one tile:
each key and value is read once. The last program of a sequence and kv head to finish adds the parts up, in the order of
the splits, so a result depends neither on other sequences nor on who ends first. One part needs no adding up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.attention_common import ALL_HEADS, Heads, attention_specialisation, checked_cap, weigh
from gemma2_fast.triton_kernels.dependent_launch import wait_for_predecessor
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import tuned

FEWEST_ROWS = 16  # of a product on the matrix units
MOST_QUERIES = 8  # of a sequence, whatever its group: a token and seven guesses to be verified
# What models have whose groups are too large for so many queries in FEWEST_ROWS.
LARGE_GROUPS = (
    *(Heads(256, 4, capped=False, windowed=windowed) for windowed in (False, True)),  # Gemma 3 of 270M and 1B
    Heads(256, 8, capped=False, windowed=False),  # Gemma 1 2B
    *(Heads(256, group, capped=False, windowed=True) for group in (10, 16)),  # RecurrentGemma 2B and 9B
)


@triton.jit
def _add_up(
    parts, part_sums, first_part, num_splits, row, present,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Sums and denominators of these rows, of all splits in their order."""
    dims = tl.arange(0, HEAD_DIM)
    sums = tl.zeros([row.shape[0], HEAD_DIM], tl.float32)
    denominator = tl.zeros([row.shape[0]], tl.float32)
    maximum = tl.full([row.shape[0]], float("-inf"), tl.float32)
    for index in range(num_splits):
        # Past the first-level cache, which may hold what was there before.
        part = parts + ((first_part + index) * ROWS + row)[:, None] * HEAD_DIM + dims[None, :]
        of_part = part_sums + (first_part + index) * (2 * ROWS) + row
        added = tl.load(part, mask=present[:, None], other=0.0, cache_modifier=".cg")
        added_denominator = tl.load(of_part, cache_modifier=".cg")
        if CAPPED:
            sums += added
            denominator += added_denominator
        else:
            added_maximum = tl.load(of_part + ROWS, cache_modifier=".cg")
            highest = tl.maximum(maximum, added_maximum)
            reference = tl.where(highest == float("-inf"), 0.0, highest)
            decay, growth = tl.exp2(maximum - reference), tl.exp2(added_maximum - reference)
            sums = sums * decay[:, None] + added * growth[:, None]
            denominator = denominator * decay + added_denominator * growth
            maximum = highest
    return sums, denominator


@triton.jit
def _store(
    out, out_stride, sums, denominator, row, begin, num_queries, kv_head, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Rows of a query and a head each, of the queries that there are."""
    query = row // GROUP
    present = query < num_queries
    denominator = tl.where(present, denominator, 1.0)
    token = (begin + query).to(tl.int64)
    head = (kv_head * GROUP + row % GROUP) * HEAD_DIM
    places = out + (token * out_stride + head)[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    tl.store(places, (sums / denominator[:, None]).to(out.dtype.element_ty), mask=present[:, None])


@triton.jit
def attention_decode_kernel(
    queries, pages, num_kv_heads, block_table, table_width, first_token, context_tokens, out, parts, part_sums,
    arrivals, query_stride, out_stride, scale, cap, window,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """out[t, h] = sum over s of softmax(mask(cap(scale * queries[t, h] . key[s]))) * value[s].

    As attention_prefill_kernel, for the first S sequences, of at most ROWS / GROUP queries each. parts
    [S, K, splits, ROWS, D] and part_sums [S, K, splits, 2, ROWS] are float32 scratch; arrivals [S, K] int32 is zero
    before and after. Grid: (splits, K, S).
    """
    tl.static_assert(PAGE % BLOCK == 0, "a block of keys must not cross pages")
    tl.static_assert(ROWS >= GROUP, "a program must hold the heads of a query")
    ADDED_ROWS: tl.constexpr = min(ROWS, 64)  # at once: registers hold their sums so far and those of a part
    wait_for_predecessor(DEPENDENT)
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    kv_head = tl.program_id(1)
    sequence = tl.program_id(2)
    begin = tl.load(first_token + sequence)
    num_queries = tl.load(first_token + sequence + 1) - begin
    if num_queries == 0:  # as of a sequence that only fills up a graph's batch
        return
    context = tl.load(context_tokens + sequence)
    table = block_table + sequence.to(tl.int64) * table_width

    end_key = context + num_queries
    first_key = 0
    if WINDOWED:
        first_key = tl.maximum(context - window + 1, 0)
    first_block = first_key // BLOCK
    num_blocks = tl.cdiv(end_key, BLOCK) - first_block
    split_blocks = tl.cdiv(num_blocks, splits)
    num_splits = tl.cdiv(num_blocks, split_blocks)
    if split >= num_splits:
        return

    row = tl.arange(0, ROWS)
    query = row // GROUP
    present = query < num_queries
    dims = tl.arange(0, HEAD_DIM)
    token = (begin + query).to(tl.int64)
    head = (kv_head * GROUP + row % GROUP) * HEAD_DIM
    tile = tl.load(queries + (token * query_stride + head)[:, None] + dims[None, :], mask=present[:, None], other=0.0)
    positions = context + query

    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    denominator = tl.zeros([ROWS], tl.float32)
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    first = first_block + split * split_blocks
    end = tl.minimum(first + split_blocks, first_block + num_blocks)
    slots = tl.arange(0, BLOCK)
    page = tl.load(table + (first * BLOCK // PAGE) % table_width).to(tl.int64)
    for block in range(first, end):
        keys = block * BLOCK + slots
        exists = (keys >= first_key) & (keys < end_key)
        key_rows = pages + (page * 2 * num_kv_heads + kv_head) * (PAGE * HEAD_DIM) + (block * BLOCK % PAGE) * HEAD_DIM
        value_rows = key_rows + num_kv_heads * (PAGE * HEAD_DIM)
        later = (block + 1) * BLOCK
        page = tl.load(table + (later // PAGE) % table_width, mask=later < end_key, other=0).to(tl.int64)
        key = tl.load(key_rows + slots[None, :] * HEAD_DIM + dims[:, None])
        value = tl.load(value_rows + slots[:, None] * HEAD_DIM + dims[None, :], mask=exists[:, None], other=0.0)
        seen = exists[None, :] & (keys[None, :] <= positions[:, None])
        if WINDOWED:
            seen = seen & (keys[None, :] > positions[:, None] - window)
        weights, maximum, decay = weigh(tl.dot(tile, key), seen, maximum, scale, cap, CAPPED, True)
        if CAPPED:
            denominator += tl.sum(weights, 1)
        else:
            denominator = denominator * decay + tl.sum(weights, 1)
            sums = sums * decay[:, None]
        sums = tl.dot(weights.to(value.dtype), value, sums)

    if num_splits == 1:
        _store(out, out_stride, sums, denominator, row, begin, num_queries, kv_head, GROUP, HEAD_DIM)
        return
    pair = sequence * num_kv_heads + kv_head
    first_part = pair.to(tl.int64) * splits
    part = parts + ((first_part + split) * ROWS + row)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(part, sums, mask=present[:, None])
    of_part = part_sums + (first_part + split) * (2 * ROWS) + row
    tl.store(of_part, denominator)
    tl.store(of_part + ROWS, maximum)
    tl.debug_barrier()  # one thread reports what all have stored
    if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") != num_splits - 1:
        return
    tl.store(arrivals + pair, 0)
    for first_row in range(0, ROWS, ADDED_ROWS):
        rows = first_row + tl.arange(0, ADDED_ROWS)
        whole, weight = _add_up(
            parts, part_sums, first_part, num_splits, rows, rows // GROUP < num_queries, CAPPED, ROWS, HEAD_DIM
        )
        _store(out, out_stride, whole, weight, rows, begin, num_queries, kv_head, GROUP, HEAD_DIM)


def attention_decode(
    queries: Any, pages: Any, block_table: Any, first_token: Any, context_tokens: Any, out: Any, parts: Any,
    part_sums: Any, arrivals: Any, *, query_scale: float, score_softcap: float | None, window_keys: int | None,
    block: int = 64, num_warps: int = 4, num_stages: int = 3,
) -> None:  # fmt: skip
    """queries, out [T, H, D]; pages [N, 2, K, P, D]; block_table [S, table_width], first_token [S + 1] and
    context_tokens [S] int32; parts [S, K, splits, rows, D] and part_sums [S, K, splits, 2, rows] float32; arrivals
    [S, K] int32, zero; rows: rows_for the queries of any sequence. Tokens of further sequences are left alone."""
    _, heads, head_dim = queries.shape
    _, _, num_kv_heads, page, _ = pages.shape
    num_sequences, _, splits, rows, _ = parts.shape
    attention_decode_kernel[(splits, num_kv_heads, num_sequences)](
        queries, pages, num_kv_heads, block_table, block_table.shape[1], first_token, context_tokens, out, parts,
        part_sums, arrivals, queries.stride(0), out.stride(0), query_scale, checked_cap(score_softcap),
        window_keys or 0, CAPPED=score_softcap is not None, WINDOWED=window_keys is not None,
        GROUP=heads // num_kv_heads, HEAD_DIM=head_dim, PAGE=page, ROWS=rows, BLOCK=block, num_warps=num_warps,
        num_stages=num_stages,
    )  # fmt: skip


def rows_for(group: int, num_queries: int) -> int:
    """Of a program that has room for so many queries of a sequence. ValueError where none has."""
    if group * num_queries <= FEWEST_ROWS:
        return FEWEST_ROWS
    if num_queries > MOST_QUERIES:
        most = max(MOST_QUERIES, FEWEST_ROWS // group)
        raise ValueError(
            f"attention_decode: at most {most} queries a sequence, a kv head having {group} query heads; got "
            f"{num_queries}: use attention_prefill"
        )
    return int(triton.next_power_of_2(group * MOST_QUERIES))


def specialisations(arch: int) -> Iterator[Specialisation]:
    scratch = {"parts": "*fp32", "part_sums": "*fp32", "arrivals": "*i32"}
    cases = [(heads, FEWEST_ROWS) for heads in ALL_HEADS]
    cases += [(heads, rows_for(heads.group, MOST_QUERIES)) for heads in LARGE_GROUPS]
    for heads, rows in cases:
        sizes = tuned("attention_decode", arch, head_dim=heads.head_dim, ROWS=rows)
        yield attention_specialisation("attention_decode", attention_decode_kernel, scratch, heads, sizes)
