"""Split attention of few queries, in Triton's interpreter, against float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels.attention_decode import MOST_QUERIES, attention_decode, rows_for
from gemma2_fast.triton_kernels.build import TARGETS, needed
from tests.support.closeness import assert_close, assert_rejected
from tests.triton_kernels.paged_batch import Floats, PagedBatch, beside_others

GROUPS = (1, 2, 4, 8, 10, 16)  # of query heads a kv head, of Gemma 1 to 3 and RecurrentGemma


def attend(batch: PagedBatch, splits: int = 3, block: int = 16, times: int = 1, sequences: int | None = None) -> Floats:
    """`times`: over again, in the scratch of the time before. sequences: only the first ones, of all if None."""
    queries = batch.flat_queries
    num_sequences, kv_heads = sequences or len(batch.lengths), batch.pages.shape[2]
    rows = rows_for(queries.shape[1] // kv_heads, max(new for _, new in batch.lengths[:num_sequences]))
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


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("new", [2, 5, 8])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_several_queries(group: int, new: int, cap: float | None) -> None:
    """As guesses are verified, each of which sees its own keys only: of the first sequence in mid-window, of the second
    across a page's edge on either side of the window, and one that has but a token."""
    lengths = [(40, new), (108 - new // 2, new), (3, 1), (0, new)]
    assert_right(PagedBatch.make(lengths, group=group, cap=cap, window=30))


@pytest.mark.parametrize("group", GROUPS)
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


def test_further_sequences_are_left_alone() -> None:
    """As prompts in a step with decoding ones: what is computed are the bits of the first sequences alone."""
    mixed = PagedBatch.make([(100, 1), (30, 1), (0, 40), (77, 9)], cap=20.0, window=50)
    alone = replace(mixed, lengths=mixed.lengths[:2], queries=mixed.queries[:2], block_table=mixed.block_table[:2])
    out = attend(mixed, sequences=2)
    np.testing.assert_array_equal(out[:2], attend(alone))
    assert np.isnan(out[2:]).all()


@pytest.mark.parametrize("group", [2, 4, 16])
def test_mutants_are_rejected(group: int) -> None:
    window, cap = 21, 20.0
    batch = PagedBatch.make([(60, 8)], kv_heads=2, group=group, cap=cap, window=window)
    exact, usual = batch.reference(np.float64), batch.reference(np.float32)
    assert_close("attention", attend(batch), exact, usual)
    for mistake in (
        {"window": window + 1},
        {"window": window - 1},
        {"cap": None},
        {"scale": 1 / 4},
        {"kv_step": 1},
        {"sees_ahead": 1},
    ):
        assert_rejected("attention", batch.reference(np.float64, **mistake), exact, usual)


def test_rows() -> None:
    """A few widths for all groups, so that few kernels are compiled."""
    assert [rows_for(group, 1) for group in GROUPS] == 6 * [16]
    assert [rows_for(group, MOST_QUERIES) for group in GROUPS] == [16, 16, 32, 64, 128, 128]
    assert (rows_for(1, 16), rows_for(8, 2), rows_for(8, 3)) == (16, 16, 64)


@pytest.mark.parametrize(("group", "most"), [(1, 16), (2, 8), (10, 8)])
def test_more_queries_than_any_program_has_room_for(group: int, most: int) -> None:
    assert rows_for(group, most)
    with pytest.raises(ValueError, match=f"at most {most} queries .* got {most + 1}: use attention_prefill"):
        rows_for(group, most + 1)


@pytest.mark.parametrize("arch", TARGETS)
def test_several_queries_of_every_model_are_compiled(arch: int) -> None:
    """Group, cap and window of the layers of each."""
    models = {
        "Gemma 1 2B": [(8, False, False)],
        "Gemma 1 7B": [(1, False, False)],
        "Gemma 2": [(2, True, False), (2, True, True)],
        "Gemma 3 270M and 1B": [(4, False, False), (4, False, True)],
        "Gemma 3 4B and later": [(2, False, False), (2, False, True)],
        "RecurrentGemma 2B": [(10, False, True)],
        "RecurrentGemma 9B": [(16, False, True)],
    }
    compiled = {
        tuple(s.constants[name] for name in ("GROUP", "CAPPED", "WINDOWED")): s.constants["ROWS"]
        for s in needed(arch, ["attention_decode"])
    }  # the last is the widest
    for layers in models.values():
        for group, capped, windowed in layers:
            assert compiled[group, capped, windowed] == rows_for(group, MOST_QUERIES)
