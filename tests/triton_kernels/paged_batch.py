"""A ragged batch over one layer's paged cache, laid out as the GPU kernels read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.ops import plain

Floats = NDArray[np.float32]


def beside_others(queries: torch.Tensor) -> torch.Tensor:
    """The same queries [T, H, D] as they lie in a row with keys and values: tokens farther apart."""
    heads = queries.shape[1]
    rows = torch.full((len(queries), heads + 2, queries.shape[2]), math.nan)
    rows[:, :heads] = queries
    return rows[:, :heads]


@dataclass(frozen=True)
class PagedBatch:
    """`lengths`: of each sequence the tokens in the cache before the step, and the new ones.

    keys, values: of each sequence [positions, K, D]; queries: [new, H, D]. Scores have a standard deviation of 2.5
    without a cap and of 1.2 caps with one, so that the cap bites. Slots that no token was written to hold NaN, blocks
    lie in no order, and what the table names outside of what is seen must not be read.
    """

    lengths: tuple[tuple[int, int], ...]
    keys: tuple[Floats, ...]
    values: tuple[Floats, ...]
    queries: tuple[Floats, ...]
    pages: torch.Tensor  # [N, 2, K, P, D]
    block_table: torch.Tensor
    rule: dict[str, Any]

    @classmethod
    def make(
        cls,
        lengths: Sequence[tuple[int, int]],
        *,
        kv_heads: int = 1,
        group: int = 2,
        head_dim: int = 16,
        page: int = 16,
        cap: float | None = None,
        window: int | None = None,
        seed: int = 0,
    ) -> PagedBatch:
        rng = np.random.default_rng(seed)
        draw: Callable[..., Floats] = lambda *shape: rng.standard_normal(shape, np.float32)  # noqa: E731
        sizes = [context + new for context, new in lengths]
        keys = tuple(draw(size, kv_heads, head_dim) for size in sizes)
        values = tuple(draw(size, kv_heads, head_dim) for size in sizes)
        queries = tuple(draw(new, kv_heads * group, head_dim) for _, new in lengths)
        # A windowed table is a ring: as wide as the window and the longest chunk need.
        width = -(-max(sizes) // page)
        if window is not None:
            width = min(width, -(-(window + max(new for _, new in lengths)) // page) + 1)
        order = rng.permutation(len(lengths) * width + 3)
        table = order[: len(lengths) * width].reshape(len(lengths), width).astype(np.int32)
        pages = np.full((len(order), 2, kv_heads, page, head_dim), np.nan, np.float32)
        unread = np.int32(2**30)
        for s, (context, _) in enumerate(lengths):
            first_seen = 0 if window is None else max(0, context - window + 1)
            named = set()
            for position in range(first_seen // page * page, sizes[s]):
                column = position // page % width
                named.add(column)
                if position >= first_seen:
                    pages[table[s, column], 0, :, position % page] = keys[s][position]
                    pages[table[s, column], 1, :, position % page] = values[s][position]
            table[s, [column for column in range(width) if column not in named]] = unread
        spread = 2.5 if cap is None else 1.2 * cap
        rule = {"query_scale": spread / math.sqrt(head_dim), "score_softcap": cap, "window_keys": window}
        return cls(tuple(lengths), keys, values, queries, torch.from_numpy(pages), torch.from_numpy(table), rule)

    @property
    def first_token(self) -> torch.Tensor:
        return torch.tensor(np.cumsum([0, *(new for _, new in self.lengths)]), dtype=torch.int32)

    @property
    def context_tokens(self) -> torch.Tensor:
        return torch.tensor([context for context, _ in self.lengths], dtype=torch.int32)

    @property
    def flat_queries(self) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(self.queries))

    def reference(self, dtype: type, **mistakes: Any) -> Floats:
        """[T, H, D] in the dtype; mistakes: other arguments of plain.attention, and `kv_step`, heads to be off by."""
        rule = {
            "scale": self.rule["query_scale"],
            "cap": self.rule["score_softcap"],
            "window": self.rule["window_keys"],
            **mistakes,
        }
        kv_step = rule.pop("kv_step", 0)
        outs = []
        for (context, new), keys, values, queries in zip(
            self.lengths, self.keys, self.values, self.queries, strict=True
        ):
            if new == 0:
                continue
            kv_heads = keys.shape[1]
            grouped = queries.reshape(new, kv_heads, -1, queries.shape[-1])
            heads = [
                plain.attention(
                    grouped[:, k].astype(dtype),
                    keys[:, (k + kv_step) % kv_heads].astype(dtype),
                    values[:, (k + kv_step) % kv_heads].astype(dtype),
                    first_position=context,
                    **rule,
                )
                for k in range(kv_heads)
            ]
            outs.append(np.stack(heads, axis=1).reshape(queries.shape))
        return np.concatenate(outs)
