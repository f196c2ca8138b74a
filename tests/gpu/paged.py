"""Ragged sequences over one layer's paged cache, on a place's device, whose edges matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.gpu import plain
from tests.gpu.places import Place

Tensor = torch.Tensor


@dataclass(frozen=True)
class Heads:
    """Of attention: H, K, D, the cap and the window."""

    query_heads: int
    kv_heads: int
    head_dim: int
    cap: float | None = None
    window: int | None = None

    @property
    def group(self) -> int:
        return self.query_heads // self.kv_heads

    @property
    def spread(self) -> float:
        """The scores' standard deviation: with a cap some reach it."""
        return 2.5 if self.cap is None else 0.4 * self.cap


class PagedSequences:
    """lengths: of each sequence the tokens in the cache before the step, and the new ones.

    Pages lie in no order. Slots that no token was written to hold NaN, as does the page that the table names where
    nothing is to be read. The first and the last query of a sequence have their highest scores at the first key they
    see and at the one before, the first query at the key after its own, too.
    """

    def __init__(self, place: Place, heads: Heads, lengths: Sequence[tuple[int, int]]) -> None:
        self.place, self.heads, self.lengths = place, heads, tuple(lengths)
        rows = sum(new for _, new in lengths)
        # As in a row with keys and values: tokens lie farther apart than their queries.
        row = place.draw(rows, heads.query_heads + 2 * heads.kv_heads, heads.head_dim)
        self.queries = row[:, : heads.query_heads]
        self.scale = heads.spread / math.sqrt(heads.head_dim)
        self.first_token = place.ints(np.cumsum([0, *(new for _, new in lengths)]))
        self.context_tokens = place.ints([context for context, _ in lengths])
        self.keys, self.values = [], []
        for index, (context, new) in enumerate(lengths):
            both = place.draw(2 + index % 2, context + new, heads.kv_heads, heads.head_dim)
            self.keys.append(both[0])
            self.values.append(both[1])
            if new:
                self._plant(index)
        self._fill_pages()

    @property
    def rule(self) -> dict[str, Any]:
        return {"query_scale": self.scale, "score_softcap": self.heads.cap, "window_keys": self.heads.window}

    def _of(self, index: int) -> Tensor:
        first, end = self.first_token[index : index + 2].tolist()
        return self.queries[first:end]

    def _plant(self, index: int) -> None:
        (context, new), queries = self.lengths[index], self._of(index)
        wanted = [(0, context + 1)] if new > 1 else []
        for query in (0, new - 1):
            own = context + query
            first = 0 if self.heads.window is None else max(0, own - self.heads.window + 1)
            wanted += [(query, key) for key in (first - 1, first) if 0 <= key < own]
        for query, key in wanted:
            towards = queries[query, :: self.heads.group].float()
            score = 8 * self.heads.spread
            length = self.scale * towards.square().sum(-1, keepdim=True)
            self.keys[index][key] = (towards * score / length).to(self.place.dtype)

    def _fill_pages(self) -> None:
        page, window = self.place.page_tokens, self.heads.window
        width = -(-max(context + new for context, new in self.lengths) // page)
        if window is not None:  # a ring: as wide as the window and the longest chunk need
            width = min(width, -(-(window + max(new for _, new in self.lengths)) // page) + 1)
        order = np.random.default_rng(0).permutation(len(self.lengths) * width + 1)
        table, nobodys = order[:-1].reshape(-1, width).astype(np.int32), order[-1]
        self.pages = self.place.nothing(len(order), 2, self.heads.kv_heads, page, self.heads.head_dim)
        for index, (context, new) in enumerate(self.lengths):
            first_seen = 0 if window is None else max(0, context - window + 1)
            blocks = range(first_seen // page, -(-(context + new) // page))
            for block in blocks:
                begin, end = max(block * page, first_seen), min((block + 1) * page, context + new)
                slots = slice(begin % page, begin % page + end - begin)
                place = table[index, block % width]
                self.pages[place, 0, :, slots] = self.keys[index][begin:end].transpose(0, 1)
                self.pages[place, 1, :, slots] = self.values[index][begin:end].transpose(0, 1)
            table[index, sorted(set(range(width)) - {block % width for block in blocks})] = nobodys
        self.block_table = self.place.ints(table)

    def reference(self, dtype: torch.dtype, kv_step: int = 0, **mistakes: Any) -> Tensor:
        """[T, H, D] in the dtype; mistakes: other arguments of plain.attention, and kv heads to be off by."""
        rule = {"scale": self.scale, "cap": self.heads.cap, "window": self.heads.window, **mistakes}
        outs = [
            plain.attention(
                self._of(index).to(dtype),
                self.keys[index].roll(-kv_step, 1).to(dtype),
                self.values[index].roll(-kv_step, 1).to(dtype),
                context=context,
                **rule,
            )
            for index, (context, new) in enumerate(self.lengths)
            if new
        ]
        return torch.cat(outs)

    def mutants(self) -> dict[str, Tensor]:
        """Results of attention with one mistake each."""
        heads, longest = self.heads, max(context + new for context, new in self.lengths)
        wrong: dict[str, dict[str, Any]] = {"another scale": {"scale": self.scale / 4}}
        if heads.window is None:
            wrong["a window"] = {"window": longest - 1}
        else:
            wrong |= {"window + 1": {"window": heads.window + 1}, "window - 1": {"window": heads.window - 1}}
        if heads.cap is not None:
            wrong["no cap"] = {"cap": None}
        if heads.kv_heads > 1:
            wrong["another kv head"] = {"kv_step": 1}
        if any(new > 1 for _, new in self.lengths):
            wrong["the next key"] = {"sees_ahead": 1}
        return {name: self.reference(torch.float64, **mistake) for name, mistake in wrong.items()}
