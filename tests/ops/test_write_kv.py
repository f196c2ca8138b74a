"""The layout of a page (csrc/cpu/kernels/kv_page.h): float32, bfloat16 and int8."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import PagedKv
from gemma2_fast.errors import RequestError
from tests.support.paged_cache import (
    PAGE_TOKENS,
    Floats,
    PagedCache,
    from_bfloat16,
    int8_codes,
    round_to_bfloat16,
)


def in_order(row: Floats, kv_dtype: str) -> Floats:
    """Elements of rows of 32 by their index: bfloat16 stores 0, 16, 1, 17, …"""
    if kv_dtype == "float32":
        return row
    return from_bfloat16(row).reshape(*row.shape[:-1], 16, 2).swapaxes(-1, -2).reshape(row.shape)


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("head_dim", [1, 32, 80, 256])
def test_pages_are_as_large_as_planned(ops: _core.Ops, kv_dtype: str, head_dim: int) -> None:
    """The count of engine/cache_plan.py is that of the kernels."""
    block_bytes = PagedKv((0,), 2, head_dim, None, num_blocks=3, table_width=3).block_bytes(kv_dtype, PAGE_TOKENS)
    element = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.uint8}[kv_dtype]
    size = block_bytes // 2 // np.dtype(element).itemsize
    rows = np.ones((2, head_dim), np.float32)
    ops.write_kv(np.zeros((3, 2, size), element), 2, 31, rows, rows)
    for wrong in (size - 1, size + 1):
        with pytest.raises(RequestError, match="bytes a page"):
            ops.write_kv(np.zeros((3, 2, wrong), element), 2, 31, rows, rows)


def read_page(cache: PagedCache, block: int) -> tuple[Floats, Floats]:
    """Keys and values [P, D] of the first head."""
    padded = -(-cache.head_dim // 32) * 32
    keys, values = in_order(cache.pages[block, 0].reshape(2, padded, PAGE_TOKENS), cache.kv_dtype)
    panels = values.reshape(padded // 32, PAGE_TOKENS, 32).swapaxes(0, 1).reshape(PAGE_TOKENS, padded)
    return keys[: cache.head_dim].T, panels[:, : cache.head_dim]


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_by_hand(ops: _core.Ops, kv_dtype: str) -> None:
    """Position 33 is slot 1 of logical page 1, which lies in block 2; only its elements are written."""
    head_dim = 35
    cache = PagedCache(ops, kv_dtype, kv_heads=2, head_dim=head_dim, table=[0, 2], num_blocks=4)
    keys = np.arange(1, 71, dtype=np.float32).reshape(1, 2, head_dim)
    cache.write(33, keys, 2 * keys)
    pages = in_order(cache.pages.reshape(4, 2, 2, 64, PAGE_TOKENS), kv_dtype)
    expected = np.full((4, 2, 2, 64, PAGE_TOKENS), np.nan, np.float32)
    for head in range(2):
        expected[2, head, 0, :head_dim, 1] = keys[0, head]
        expected[2, head, 1, 1] = 2 * keys[0, head, :32]  # values of dims 0 to 31, slot 1
        expected[2, head, 1, 32 + 1, :3] = 2 * keys[0, head, 32:]
    np.testing.assert_array_equal(pages, expected)


def test_int8_by_hand(ops: _core.Ops) -> None:
    """Scales 1 and 2; keys are stored as code + 128, four dims together; values as codes, four tokens together."""
    cache = PagedCache(ops, "int8", kv_heads=1, head_dim=5, table=[0], num_blocks=1)
    key = np.array([[[127, 0.5, 1.5, -2.4, -127]]], np.float32)
    cache.write(6, key, 2 * key[..., ::-1])
    page = cache.pages[0, 0]
    expected = np.full(2 * 32 * PAGE_TOKENS + 2 * 4 * PAGE_TOKENS, 0xFF, np.uint8)
    expected[6 * 4 : 6 * 4 + 4] = [255, 128, 130, 126]
    expected[(PAGE_TOKENS + 6) * 4] = 1
    values = expected[32 * PAGE_TOKENS : 2 * 32 * PAGE_TOKENS].reshape(8, 32, 4)  # group of tokens, dim, token
    values[1, :5, 2] = np.array([-127, -2, 2, 0, 127]).astype(np.int8).view(np.uint8)
    scales = expected[2 * 32 * PAGE_TOKENS :].view(np.float32).reshape(2, PAGE_TOKENS)
    scales[:, 6] = [1, 2]
    np.testing.assert_array_equal(page, expected)


@pytest.mark.parametrize("head_dim", [1, 7, 64, 80, 256])
def test_int8_of_random_numbers(ops: _core.Ops, head_dim: int) -> None:
    """The same bytes on every instruction set: those of NumPy."""
    rng = np.random.default_rng(head_dim)
    keys, values = rng.standard_normal((2, PAGE_TOKENS, 1, head_dim), np.float32)
    keys[3], values[4] = 0, 1e-44
    cache = PagedCache.filled(ops, "int8", keys, values)
    page = cache.pages[cache.table[0], 0]
    padded = -(-head_dim // 32) * 32
    half = padded * PAGE_TOKENS
    key_codes = page[:half].reshape(padded // 4, PAGE_TOKENS, 4).swapaxes(0, 1).reshape(PAGE_TOKENS, padded)
    value_codes = page[half : 2 * half].view(np.int8).reshape(padded // 32, 8, 32, 4).transpose(1, 3, 0, 2)
    scales = page[2 * half :].view(np.float32).reshape(2, PAGE_TOKENS)
    for given, stored, scale in (
        (keys, key_codes.astype(np.int32) - 128, scales[0]),
        (values, value_codes.reshape(PAGE_TOKENS, padded), scales[1]),
    ):
        codes, expected_scales = int8_codes(given[:, 0])
        np.testing.assert_array_equal(stored[:, :head_dim], codes)
        np.testing.assert_array_equal(scale, expected_scales[:, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_of_bad_numbers(ops: _core.Ops, bad: float) -> None:
    """A row that holds one has no scale."""
    keys = np.ones((1, 1, 20), np.float32)
    keys[0, 0, 17] = bad
    cache = PagedCache.filled(ops, "int8", keys, np.ones((1, 1, 20), np.float32))
    scales = cache.pages[cache.table[0], 0, 2 * 32 * PAGE_TOKENS :].view(np.float32).reshape(2, PAGE_TOKENS)
    assert np.isnan(scales[0, 0])
    assert scales[1, 0] == np.float32(1) / np.float32(127)


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
    for stored in read_page(cache, 0):
        np.testing.assert_array_equal(stored[0], np.float32(list(cases.values())))


def test_nan_stays_nan_in_bfloat16(ops: _core.Ops) -> None:
    """Its payload may lie in the bits that are cut off, or carry into infinity when rounded."""
    for bits in (0x7F800001, 0x7FFFFFFF, 0xFF800001, 0x7FC00000):
        cache = PagedCache(ops, "bfloat16", kv_heads=1, head_dim=1, table=[0], num_blocks=1)
        cache.pages[:] = 0
        nan = np.array([bits], np.uint32).view(np.float32).reshape(1, 1, 1)
        cache.write(0, nan, nan)
        for stored in read_page(cache, 0):
            assert np.isnan(stored[0, 0])


@pytest.mark.parametrize("head_dim", [1, 7, 64, 80])
def test_bfloat16_of_random_numbers(ops: _core.Ops, head_dim: int) -> None:
    rng = np.random.default_rng(head_dim)
    keys, values = rng.standard_normal((2, PAGE_TOKENS, 1, head_dim), np.float32)
    cache = PagedCache.filled(ops, "bfloat16", keys, values)
    for stored, given in zip(read_page(cache, cache.table[0]), (keys, values), strict=True):
        np.testing.assert_array_equal(stored, round_to_bfloat16(given[:, 0]))
