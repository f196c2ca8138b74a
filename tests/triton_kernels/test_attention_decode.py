"""Split attention of few queries, in Triton's interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels.attention_decode import attention_decode
from tests.support.closeness import assert_close, assert_rejected
from tests.triton_kernels.paged_batch import Floats, PagedBatch, beside_others


def attend(batch: PagedBatch, splits: int = 3, rows: int = 16, block: int = 16, times: int = 1) -> Floats:
    """`times`: over again, in the scratch of the time before."""
    queries = batch.flat_queries
    num_sequences, kv_heads = len(batch.lengths), batch.pages.shape[2]
    parts = torch.full((num_sequences, kv_heads, splits, rows, queries.shape[2]), math.nan)
    queries = beside_others(queries)
    part_sums = torch.full((num_sequences, kv_heads, splits, 2, rows), math.nan)
    arrivals = torch.zeros((num_sequences, kv_heads), dtype=torch.int32)
    for _ in range(times):
        out = torch.full_like(batch.flat_queries, math.nan)
        attention_decode(
            queries, batch.pages, batch.block_table, batch.first_token, batch.context_tokens, out, parts, part_sums,
            arrivals, **batch.rule, block=block,
        )  # fmt: skip
        assert not arrivals.any()
    return out.numpy()


def assert_right(batch: PagedBatch, **how: int) -> None:
    assert_close("attention", attend(batch, **how), batch.reference(np.float64), batch.reference(np.float32))


@pytest.mark.parametrize("splits", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("cap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 1, 16, 40])
def test_splits(splits: int, cap: float | None, window: int | None) -> None:
    """More splits than blocks, too; sequences of no key, one, a page, and past the window by more than a block."""
    lengths = [(0, 1), (15, 1), (0, 0), (16, 1), (123, 1)]
    assert_right(PagedBatch.make(lengths, kv_heads=2, cap=cap, window=window), splits=splits)


@pytest.mark.parametrize("new", [2, 5, 8])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_several_queries(new: int, cap: float | None) -> None:
    """As a guess is verified: each sees its own keys only."""
    assert_right(PagedBatch.make([(40, new), (3, 1), (0, new)], cap=cap, window=30))


@pytest.mark.parametrize("group", [1, 4, 8, 10, 16])
def test_groups(group: int) -> None:
    assert_right(PagedBatch.make([(50, 1)], group=group, kv_heads=2, cap=20.0))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_head_dims(head_dim: int) -> None:
    assert_right(PagedBatch.make([(70, 1)], head_dim=head_dim, cap=50.0))


@pytest.mark.parametrize(("page", "block"), [(32, 16), (64, 16), (64, 64)])
def test_pages(page: int, block: int) -> None:
    assert_right(PagedBatch.make([(150, 1), (64, 1)], page=page, cap=20.0, window=60), block=block)


def test_scratch_serves_again() -> None:
    batch = PagedBatch.make([(100, 1), (30, 2)], cap=20.0)
    np.testing.assert_array_equal(attend(batch, times=2), attend(batch))


def test_a_sequence_does_not_feel_the_others() -> None:
    together = PagedBatch.make([(100, 1), (30, 1), (77, 1)], window=50)
    for index in range(3):
        alone = replace(
            together,
            lengths=together.lengths[index : index + 1],
            queries=together.queries[index : index + 1],
            block_table=together.block_table[index : index + 1],
        )
        np.testing.assert_array_equal(attend(alone)[0], attend(together)[index])


def test_mutants_are_rejected() -> None:
    window, cap = 21, 20.0
    batch = PagedBatch.make([(60, 3)], kv_heads=2, cap=cap, window=window)
    exact, usual = batch.reference(np.float64), batch.reference(np.float32)
    assert_close("attention", attend(batch), exact, usual)
    for mistake in ({"window": window + 1}, {"window": window - 1}, {"cap": None}, {"scale": 1 / 4}, {"kv_step": 1}):
        assert_rejected("attention", batch.reference(np.float64, **mistake), exact, usual)
