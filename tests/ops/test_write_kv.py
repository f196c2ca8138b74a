"""The layout of a page: keys transposed to [D, P], then values [P, D]; float32 or bfloat16."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2_fast import _core
from tests.support.paged_cache import PAGE_TOKENS, PagedCache, from_bfloat16, round_to_bfloat16


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_by_hand(ops: _core.Ops, kv_dtype: str) -> None:
    """Position 33 is slot 1 of logical page 1, which lies in block 2; only its elements are written."""
    cache = PagedCache(ops, kv_dtype, kv_heads=2, head_dim=3, table=[0, 2], num_blocks=4)
    keys = np.array([[[1, 2, 3], [4, 5, 6]]], np.float32)
    cache.write(33, keys, 10 * keys)
    pages = cache.pages if kv_dtype == "float32" else from_bfloat16(cache.pages)
    expected = np.full((4, 2, 2, 3 * PAGE_TOKENS), np.nan, np.float32)
    for head in range(2):
        expected[2, head, 0].reshape(3, PAGE_TOKENS)[:, 1] = keys[0, head]
        expected[2, head, 1].reshape(PAGE_TOKENS, 3)[1] = 10 * keys[0, head]
    np.testing.assert_array_equal(pages, expected)


def test_bfloat16_rounds_to_nearest_even(ops: _core.Ops) -> None:
    """Around 1 the step is 1 / 128: halves go to the even neighbour."""
    cases = {
        1.0: 1.0,
        1 + 1 / 256: 1.0,
        1 + 3 / 256: 1 + 4 / 256,
        1 + 1 / 256 + 2**-20: 1 + 2 / 256,
        -1 - 1 / 256: -1.0,
        1e-40: round_to_bfloat16(np.float32([1e-40]))[0],
        3.4e38: np.inf,
        np.inf: np.inf,
        -np.inf: -np.inf,
    }
    cache = PagedCache(ops, "bfloat16", kv_heads=1, head_dim=len(cases), table=[0], num_blocks=1)
    numbers = np.array(list(cases), np.float32).reshape(1, 1, -1)
    cache.write(0, numbers, numbers)
    stored = from_bfloat16(cache.pages[0, 0])
    np.testing.assert_array_equal(stored[0].reshape(-1, PAGE_TOKENS)[:, 0], np.float32(list(cases.values())))
    np.testing.assert_array_equal(stored[1, : len(cases)], np.float32(list(cases.values())))


def test_nan_stays_nan_in_bfloat16(ops: _core.Ops) -> None:
    """Its payload may lie in the bits that are cut off, or carry into infinity when rounded."""
    for bits in (0x7F800001, 0x7FFFFFFF, 0xFF800001, 0x7FC00000):
        cache = PagedCache(ops, "bfloat16", kv_heads=1, head_dim=1, table=[0], num_blocks=1)
        cache.pages[:] = 0
        nan = np.array([bits], np.uint32).view(np.float32).reshape(1, 1, 1)
        cache.write(0, nan, nan)
        assert np.isnan(from_bfloat16(cache.pages[0, 0, :, 0])).all()


@pytest.mark.parametrize("head_dim", [1, 7, 64, 80])
def test_bfloat16_of_random_numbers(ops: _core.Ops, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    keys, values = rng.standard_normal((2, PAGE_TOKENS, 1, head_dim), np.float32)
    cache = PagedCache.filled(ops, "bfloat16", keys, values)
    page = from_bfloat16(cache.pages[cache.table[0], 0])
    np.testing.assert_array_equal(page[0].reshape(head_dim, PAGE_TOKENS).T, round_to_bfloat16(keys[:, 0]))
    np.testing.assert_array_equal(page[1].reshape(PAGE_TOKENS, head_dim), round_to_bfloat16(values[:, 0]))
