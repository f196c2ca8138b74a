"""Flash attention over pages, in Triton's interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels.attention_prefill import attention_prefill, prefill_tiles
from tests.support.closeness import assert_close, assert_rejected
from tests.triton_kernels.paged_batch import Floats, PagedBatch, beside_others

TILE, BLOCK = 16, 16


def attend(batch: PagedBatch, tile: int = TILE, block: int = BLOCK) -> Floats:
    queries = batch.flat_queries
    out = torch.full_like(queries, math.nan)
    queries = beside_others(queries)
    group = queries.shape[1] // batch.pages.shape[2]
    tiles = torch.tensor(prefill_tiles(batch.lengths, group, tile), dtype=torch.int32)
    attention_prefill(
        queries, batch.pages, batch.block_table, batch.first_token, batch.context_tokens, tiles, out,
        **batch.rule, tile=tile, block=block,
    )  # fmt: skip
    return out.numpy()


def assert_right(batch: PagedBatch, tile: int = TILE, block: int = BLOCK) -> None:
    assert_close("attention", attend(batch, tile, block), batch.reference(np.float64), batch.reference(np.float32))


def test_by_hand() -> None:
    """Scores of the last query: 0, ln 2, ln 4; weights 1/7, 2/7, 4/7; values 7, 14, 21."""
    batch = PagedBatch.make([(0, 3)], group=1)
    keys, values, queries = np.zeros((3, 3, 1, 16), np.float32)
    keys[:, 0, 0] = np.log([1, 2, 4])
    values[:, 0, 5] = [7, 14, 21]
    queries[..., 0] = 1
    place = int(batch.block_table[0, 0])
    batch.pages[place, 0, 0, :3] = torch.from_numpy(keys[:, 0])
    batch.pages[place, 1, 0, :3] = torch.from_numpy(values[:, 0])
    rule = {"query_scale": 1.0, "score_softcap": None, "window_keys": None}
    out = attend(replace(batch, queries=(queries,), rule=rule))
    np.testing.assert_allclose(out[:, 0, 5], [7, (7 + 28) / 3, (7 + 28 + 84) / 7], rtol=1e-6)
    assert (np.delete(out[:, 0], 5, axis=1) == 0).all()


@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 1, 15, 16, 17, 40])
def test_ragged_batches(cap: float | None, window: int | None) -> None:
    """Sequences that begin, that go on in mid-page, of one token, and past the window by more than a block."""
    lengths = [(0, 1), (0, 37), (21, 16), (90, 1), (67, 23)]
    assert_right(PagedBatch.make(lengths, kv_heads=2, cap=cap, window=window))


@pytest.mark.parametrize(("tile", "block", "page"), [(16, 16, 32), (32, 32, 32), (64, 16, 16), (16, 32, 64)])
def test_tiles(tile: int, block: int, page: int) -> None:
    """Blocks that are pages and parts of pages; tiles longer than a sequence."""
    assert_right(PagedBatch.make([(5, 50), (70, 33)], page=page, cap=20.0, window=45), tile, block)


@pytest.mark.parametrize("group", [1, 4, 8, 10, 16])
def test_groups(group: int) -> None:
    assert_right(PagedBatch.make([(3, 19), (0, 4)], group=group, kv_heads=2, cap=20.0))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_head_dims(head_dim: int) -> None:
    assert_right(PagedBatch.make([(11, 20)], head_dim=head_dim, cap=50.0, window=13))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the interpreted tanh alone
def test_scores_far_beyond_the_cap() -> None:
    """All at plus or minus the cap: weights of 2^72 and 2^-72, and sums of each alone."""
    batch = PagedBatch.make([(0, 40)], cap=50.0)
    assert_right(replace(batch, rule={**batch.rule, "query_scale": 1e4}))


def test_mutants_are_rejected() -> None:
    window, cap = 21, 20.0
    batch = PagedBatch.make([(0, 12), (30, 40)], kv_heads=2, cap=cap, window=window)
    exact, usual = batch.reference(np.float64), batch.reference(np.float32)
    assert_close("attention", attend(batch), exact, usual)
    for mistake in (
        {"window": window + 1},
        {"window": window - 1},
        {"window": None},
        {"cap": None},
        {"cap_after_mask": True},
        {"scale": 1 / 4},
        {"kv_step": 1},
    ):
        assert_rejected("attention", batch.reference(np.float64, **mistake), exact, usual)
    stale = PagedBatch.make([(0, 12), (30, 40)], kv_heads=2, cap=cap, window=window)
    stale.pages[stale.block_table[1, 2]] = stale.pages[stale.block_table[1, 3]]
    assert_rejected("attention", attend(stale), exact, usual)


def test_longest_tiles_come_first() -> None:
    lengths = [(12, 1), (0, 20), (9, 0), (3, 9)]
    assert prefill_tiles(lengths, 2, 16) == [(1, 16), (0, 0), (3, 8), (1, 8), (3, 0), (1, 0)]


@pytest.mark.parametrize("cap", [0.0, -1.0, 55.1, math.nan])
def test_a_cap_that_sums_cannot_hold_is_refused(cap: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 55.0"):
        attend(PagedBatch.make([(0, 3)], cap=cap))
