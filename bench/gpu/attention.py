"""Attention over a paged cache at long contexts, beside FlexAttention with the same mask and cap."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gemma2_fast.bench.gpu.card import Card, Run, relative_error
from gemma2_fast.bench.gpu.cases import GpuCase, block_sizes
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.shapes import SIZES
from gemma2_fast.errors import BackendError
from gemma2_fast.triton_kernels.attention_common import PAGE_TOKENS
from gemma2_fast.triton_kernels.attention_decode import attention_decode
from gemma2_fast.triton_kernels.attention_prefill import attention_prefill, prefill_tiles

CAP = 50.0
# Of scores: the cap takes a tenth of the largest.
SCORE_DEVIATION = 8.0
LARGEST_ERROR = 2e-2  # tanh.approx is off by 2^-11 of a score, which is up to 30
PROGRAMS_PER_PROCESSOR = 2  # of decode attention, as in csrc/cuda/graph_step.cpp
FLEX = "FlexAttention"
FLEX_MODE = "max-autotune-no-cudagraphs"
EXACT_QUERIES = 1024  # computed at once


@dataclass(frozen=True)
class Heads:
    query_heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def of(size: str) -> Heads:
        shape = SIZES[size]
        return Heads(shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"])

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads


@dataclass(frozen=True)
class Cache:
    """Random keys and values of `sequences` sequences of `context` tokens: pages in no order, and where they stand."""

    pages: torch.Tensor  # [N, 2, K, P, D]
    table: torch.Tensor  # [S, blocks]
    context: int

    @staticmethod
    def make(card: Card, heads: Heads, sequences: int, context: int) -> Cache:
        blocks = -(-context // PAGE_TOKENS)
        pages = card.normal(sequences * blocks, 2, heads.kv_heads, PAGE_TOKENS, heads.head_dim)
        order = torch.randperm(sequences * blocks, device=card.device, dtype=torch.int32)
        return Cache(pages, order.view(sequences, blocks), context)

    def rows(self, sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, [K, context, D] each."""
        both = self.pages[self.table[sequence].long()].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : self.context]
        return both[0], both[1]


def num_pairs(tokens: int, window: int | None) -> int:
    """Of a query and a key that it sees, in a prompt of so many tokens."""
    wide = min(tokens, window or tokens)
    return wide * (wide + 1) // 2 + (tokens - wide) * wide


def exact_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, first: int, scale: float, window: int | None
) -> torch.Tensor:
    """[T, H, D] float32, of queries [T, H, D] from position `first` on over keys and values [K, S, D]."""
    out = torch.empty_like(queries, dtype=torch.float32)
    group = queries.shape[1] // len(keys)
    key_positions = torch.arange(keys.shape[1], device=queries.device)
    for head in range(queries.shape[1]):
        key, value = keys[head // group].float(), values[head // group].float()
        for begin in range(0, len(queries), EXACT_QUERIES):
            some = queries[begin : begin + EXACT_QUERIES, head].float()
            positions = first + begin + torch.arange(len(some), device=queries.device)[:, None]
            seen = key_positions <= positions
            if window is not None:
                seen &= key_positions > positions - window
            scores = CAP * torch.tanh(some @ key.T * (scale / CAP))
            out[begin : begin + EXACT_QUERIES, head] = scores.masked_fill(~seen, -math.inf).softmax(-1) @ value
    return out


def prefill(card: Card, ceilings: GpuCeilings, size: str, tokens: int, window: int | None) -> GpuCase:
    """A prompt from its start, one step."""
    heads = Heads.of(size)
    row_bytes = 2 * 2 * (heads.query_heads + heads.kv_heads) * heads.head_dim
    copies = card.copies(tokens * row_bytes)
    queries = card.normal(copies, tokens, heads.query_heads, heads.head_dim, deviation=SCORE_DEVIATION)
    outs = card.empty(*queries.shape)
    caches = [Cache.make(card, heads, 1, tokens) for _ in range(copies)]
    how = block_sizes("attention_prefill", card, head_dim=heads.head_dim)
    tiles = _int32(card, prefill_tiles([(0, tokens)], heads.group, how["tile"]))
    first_token, context_tokens = _int32(card, [0, tokens]), _int32(card, [0])
    scale = heads.head_dim**-0.5
    rule: dict[str, Any] = {"query_scale": scale, "score_softcap": CAP, "window_keys": window}

    def run(copy: int) -> Run:
        pages, table, some, out = caches[copy].pages, caches[copy].table, queries[copy], outs[copy]
        return partial(attention_prefill, some, pages, table, first_token, context_tokens, tiles, out, **rule, **how)

    def exact(copy: int) -> torch.Tensor:
        return exact_attention(queries[copy], *caches[copy].rows(0), 0, scale, window)

    kind = "causal" if window is None else f"window {window}"
    return GpuCase(
        what="attention_prefill",
        shape=f"{size} {tokens} tokens, {heads.query_heads} heads of {heads.head_dim}, cap {CAP:.0f}, {kind}",
        runs=[run(copy) for copy in range(copies)],
        outs=list(outs),
        results=lambda copy: (outs[copy], exact(copy)),
        limit=ceilings.operations(4.0 * heads.query_heads * heads.head_dim * num_pairs(tokens, window)),
        peers={FLEX: lambda: flex_runs(card, queries, caches, scale, window, exact)},
        bars=f"attention_prefill head_dim {heads.head_dim}",
        largest_error=LARGEST_ERROR,
    )


def flex_runs(
    card: Card,
    queries: torch.Tensor,
    caches: Sequence[Cache],
    scale: float,
    window: int | None,
    exact: Callable[[int], torch.Tensor],
) -> Sequence[Run]:
    """Keys and values lie contiguous, as FlexAttention likes them. BackendError where its result is not ours."""
    tokens = queries.shape[1]

    def mask(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key <= query if window is None else (key <= query) & (key > query - window)

    def capped(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return CAP * torch.tanh(score / CAP)

    blocks = create_block_mask(mask, None, None, tokens, tokens, device=str(card.device))
    compiled: Any = torch.compile(flex_attention, mode=FLEX_MODE, dynamic=False)
    rule: dict[str, Any] = {"score_mod": capped, "block_mask": blocks, "scale": scale, "enable_gqa": True}

    def run(copy: int) -> Callable[[], torch.Tensor]:
        parts = (queries[copy].transpose(0, 1), *caches[copy].rows(0))
        query, key, value = (part[None].contiguous() for part in parts)
        return partial(compiled, query, key, value, **rule)

    runs = [run(copy) for copy in range(len(caches))]
    error = relative_error(runs[0]()[0].transpose(0, 1), exact(0))
    if not error <= LARGEST_ERROR:
        raise BackendError(f"its result is off by {error:.2g}, at most {LARGEST_ERROR}")
    return runs


def decode(card: Card, ceilings: GpuCeilings, size: str, context: int, batch: int) -> GpuCase:
    """One new token of each sequence, whose key and value are there already."""
    heads = Heads.of(size)
    num_bytes = batch * context * 2 * heads.kv_heads * heads.head_dim * 2
    copies = card.copies(num_bytes)
    caches = [Cache.make(card, heads, batch, context) for _ in range(copies)]
    queries = card.normal(batch, heads.query_heads, heads.head_dim, deviation=SCORE_DEVIATION)
    outs = card.empty(copies, *queries.shape)
    how = block_sizes("attention_decode", card, head_dim=heads.head_dim)
    rows = how.pop("rows")
    splits = num_splits(card, heads.kv_heads * batch, context, how["block"])
    parts = card.empty(batch, heads.kv_heads, splits, rows, heads.head_dim, dtype=torch.float32)
    part_sums = card.empty(batch, heads.kv_heads, splits, 2, rows, dtype=torch.float32)
    arrivals = card.empty(batch, heads.kv_heads, dtype=torch.int32).zero_()
    first_token, context_tokens = _int32(card, list(range(batch + 1))), _int32(card, [context - 1] * batch)
    scale = heads.head_dim**-0.5
    rule: dict[str, Any] = {"query_scale": scale, "score_softcap": CAP, "window_keys": None}

    def run(copy: int) -> Run:
        pages, table, out = caches[copy].pages, caches[copy].table, outs[copy]
        return partial(
            attention_decode, queries, pages, table, first_token, context_tokens, out, parts, part_sums, arrivals,
            **rule, **how,
        )  # fmt: skip

    def exact(copy: int) -> torch.Tensor:
        return torch.cat(
            [exact_attention(queries[s : s + 1], *caches[copy].rows(s), context - 1, scale, None) for s in range(batch)]
        )

    return GpuCase(
        what="attention_decode",
        shape=f"{size} context {context}, batch {batch}, {splits} splits",
        runs=[run(copy) for copy in range(copies)],
        outs=list(outs),
        results=lambda copy: (outs[copy], exact(copy)),
        limit=ceilings.bytes(num_bytes),
        bars="attention_decode",
        largest_error=LARGEST_ERROR,
    )


def num_splits(card: Card, pairs: int, keys: int, block: int) -> int:
    """As GraphStep::num_splits chooses them."""
    filling = PROGRAMS_PER_PROCESSOR * card.num_processors // pairs
    return max(1, min(filling, -(-keys // block)))


def _int32(card: Card, values: Any) -> torch.Tensor:
    return torch.tensor(values, device=card.device, dtype=torch.int32)
