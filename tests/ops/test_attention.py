"""Paged attention: soft cap, window, grouped heads; float32, bfloat16 and int8 caches."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from gemma2_fast import _core
from tests.ops import plain
from tests.support.closeness import assert_close, assert_rejected
from tests.support.paged_cache import PAGE_TOKENS, UNTOUCHABLE, Floats, PagedCache, int8_codes

KV_DTYPES = ["float32", "bfloat16", "int8"]


@dataclass(frozen=True)
class Case:
    """A sequence's keys and values [T, K, D] in a cache, queries [T, K, G, D] for every position, and the rule."""

    cache: PagedCache
    queries: Floats
    keys: Floats
    values: Floats
    rule: dict[str, Any]

    def attend(self, begin: int = 0, end: int | None = None, kv_head: int = 0) -> Floats:
        return self.cache.attend(self.queries[begin:end, kv_head], begin, kv_head=kv_head, **self.rule)

    def reference(self, dtype: type, kv_head: int = 0, **mistakes: Any) -> Floats:
        keys, values = self.cache.stored(self.keys)[:, kv_head], self.cache.stored(self.values)[:, kv_head]
        arrays = (a.astype(dtype) for a in (self.queries[:, kv_head], keys, values))
        return plain.attention(*arrays, first_position=0, **{**self.rule, **mistakes})

    def usual(self, kv_head: int = 0) -> Floats:
        """In float32 with the kernel's own roundings."""
        if self.cache.kv_dtype != "int8":
            return self.reference(np.float32, kv_head)
        keys = self.cache.stored(self.keys)[:, kv_head]
        codes, scales = int8_codes(self.values)
        queries = self.queries[:, kv_head]
        return plain.attention_int8(queries, keys, codes[:, kv_head], scales[:, kv_head], first_position=0, **self.rule)

    @property
    def op(self) -> str:
        return "attention int8" if self.cache.kv_dtype == "int8" else "attention"

    def assert_close(self, actual: Floats, kv_head: int = 0) -> None:
        assert_close(self.op, actual, self.reference(np.float64, kv_head), self.usual(kv_head))


def make_case(
    ops: _core.Ops,
    kv_dtype: str,
    *,
    tokens: int,
    group_heads: int = 2,
    head_dim: int = 64,
    kv_heads: int = 1,
    cap: float | None = None,
    window: int | None = None,
    seed: int = 0,
) -> Case:
    """Scores have a standard deviation of 2.5 without a cap and of 1.2 caps with one, so that the cap bites."""
    rng = np.random.default_rng(seed)
    queries = rng.standard_normal((tokens, kv_heads, group_heads, head_dim), np.float32)
    keys = rng.standard_normal((tokens, kv_heads, head_dim), np.float32)
    values = rng.standard_normal((tokens, kv_heads, head_dim), np.float32)
    spread = 2.5 if cap is None else 1.2 * cap
    rule = {"scale": spread / math.sqrt(head_dim), "cap": cap, "window": window}
    return Case(PagedCache.filled(ops, kv_dtype, keys, values, seed), queries, keys, values, rule)


def test_by_hand(ops: _core.Ops) -> None:
    """One dimension, scale 1. Scores of the last query: 0, ln 2, ln 4; weights 1/7, 2/7, 4/7; values 7, 14, 21."""
    keys = np.log(np.array([1, 2, 4], np.float32)).reshape(3, 1, 1)
    values = np.array([7, 14, 21], np.float32).reshape(3, 1, 1)
    cache = PagedCache.filled(ops, "float32", keys, values)
    queries = np.ones((3, 1, 1), np.float32)
    everything = cache.attend(queries, 0, scale=1.0)
    np.testing.assert_allclose(everything.ravel(), [7, (7 + 28) / 3, (7 + 28 + 84) / 7], rtol=1e-6)
    two_keys = cache.attend(queries, 0, scale=1.0, window=2)
    np.testing.assert_allclose(two_keys.ravel(), [7, (7 + 28) / 3, (14 + 42) / 3], rtol=1e-6)
    only_itself = cache.attend(queries, 0, scale=1.0, window=1)
    np.testing.assert_array_equal(only_itself.ravel(), [7, 14, 21])


def test_cap_by_hand(ops: _core.Ops) -> None:
    """Scores of 1000 and -1000 under a cap of ln(3) / 2 differ by ln 3: weights 3/4 and 1/4."""
    keys = np.array([1000, -1000], np.float32).reshape(2, 1, 1)
    values = np.array([4, 8], np.float32).reshape(2, 1, 1)
    cache = PagedCache.filled(ops, "float32", keys, values)
    out = cache.attend(np.ones((1, 1, 1), np.float32), 1, scale=1.0, cap=math.log(3) / 2)
    np.testing.assert_allclose(out.ravel(), [5], rtol=1e-6)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 67, 131, 255, 256, 257, 550])
@pytest.mark.parametrize("cap", [None, 20.0, 60.0])
def test_lengths(ops: _core.Ops, kv_dtype: str, tokens: int, cap: float | None) -> None:
    """Around one page and one block of 256 keys; a cap of 60 is too wide for weights without a maximum."""
    case = make_case(ops, kv_dtype, tokens=tokens, cap=cap, head_dim=32)
    case.assert_close(case.attend())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 40, 257])
def test_windows(ops: _core.Ops, kv_dtype: str, window: int) -> None:
    """One case holds every length from 1 past 2 * window + 3, and passes the window by several pages."""
    case = make_case(ops, kv_dtype, tokens=2 * window + 3 + 5 * PAGE_TOKENS, window=window, cap=20.0)
    case.assert_close(case.attend())


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 8, 20, 64, 80, 128, 256])
def test_head_dims(ops: _core.Ops, kv_dtype: str, head_dim: int) -> None:
    case = make_case(ops, kv_dtype, tokens=70, head_dim=head_dim, window=37)
    case.assert_close(case.attend())


@pytest.mark.parametrize("group_heads", [1, 2, 3, 4, 8, 16, 50])
def test_group_sizes(ops: _core.Ops, group_heads: int) -> None:
    case = make_case(ops, "float32", tokens=45, group_heads=group_heads, head_dim=16, cap=30.0)
    case.assert_close(case.attend())
    np.testing.assert_array_equal(case.attend(44), case.attend()[44:])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_kv_heads(ops: _core.Ops, kv_dtype: str) -> None:
    case = make_case(ops, kv_dtype, tokens=50, kv_heads=3, head_dim=24)
    for kv_head in range(3):
        case.assert_close(case.attend(kv_head=kv_head), kv_head)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_mutants_are_rejected(ops: _core.Ops, kv_dtype: str) -> None:
    window, cap = 45, 20.0
    case = make_case(ops, kv_dtype, tokens=3 * window, kv_heads=2, window=window, cap=cap)
    exact, usual = case.reference(np.float64), case.usual()
    assert_close(case.op, case.attend(), exact, usual)
    stale = replace(case, cache=PagedCache.filled(ops, kv_dtype, case.keys, case.values))
    stale.cache.pages[stale.cache.table[3]] = stale.cache.pages[stale.cache.table[1]]
    mutants = {
        "window + 1": case.reference(np.float64, window=window + 1),
        "window - 1": case.reference(np.float64, window=window - 1),
        "no window": case.reference(np.float64, window=None),
        "no cap": case.reference(np.float64, cap=None),
        "cap after the mask": case.reference(np.float64, cap_after_mask=True),
        "query scale of the head dim": case.reference(np.float64, scale=1 / math.sqrt(64)),
        "wrong kv head": case.attend(kv_head=1),
        "stale block": stale.attend(),
    }
    for mutant in mutants.values():
        assert_rejected(case.op, mutant, exact, usual)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (None, 20.0), (None, 60.0), (700, None)])
@pytest.mark.parametrize("group_heads", [1, 4, 16])
def test_bits_do_not_depend_on_threads(
    ops: _core.Ops, kv_dtype: str, window: int | None, cap: float | None, group_heads: int
) -> None:
    """One query's keys are shared among threads in pieces; many queries walk over all of them in one thread."""
    tokens = 1500
    case = make_case(
        ops, kv_dtype, tokens=tokens, group_heads=group_heads, head_dim=20, window=window, cap=cap, kv_heads=1
    )
    together = case.attend(tokens - 3)
    for threads in (1, 2, 3, 8):
        case.cache.ops = _core.Ops(ops.instruction_set, threads)
        alone = np.concatenate([case.attend(begin, begin + 1) for begin in range(tokens - 3, tokens)])
        np.testing.assert_array_equal(alone.view(np.uint32), together.view(np.uint32))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (None, 20.0), (41, 20.0)])
@pytest.mark.parametrize("group_heads", [1, 2, 8])
def test_bits_do_not_depend_on_chunks(
    ops: _core.Ops, kv_dtype: str, window: int | None, cap: float | None, group_heads: int
) -> None:
    tokens = 150
    case = make_case(ops, kv_dtype, tokens=tokens, group_heads=group_heads, head_dim=40, window=window, cap=cap)
    whole = case.attend()
    for chunk in (1, 7, 13, 32, 64, 149):
        parts = [case.attend(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)]
        np.testing.assert_array_equal(np.concatenate(parts).view(np.uint32), whole.view(np.uint32))


def test_zeros_have_one_sign(ops: _core.Ops) -> None:
    """Page 0 leaves -1e-40, which page 1 decays to -0. Page 2, seen by a later query only, would make it +0."""
    tokens = 2 * PAGE_TOKENS + 1
    keys, values = np.zeros((2, tokens, 1, 1), np.float32)
    values[:PAGE_TOKENS] = -1e-40
    keys[PAGE_TOKENS : 2 * PAGE_TOKENS] = 50
    values[-1] = 1
    cache = PagedCache.filled(ops, "float32", keys, values)
    queries = np.ones((tokens, 1, 1), np.float32)
    together = cache.attend(queries[-2:], tokens - 2, scale=1.0)
    alone = cache.attend(queries[-2:-1], tokens - 2, scale=1.0)
    np.testing.assert_array_equal(alone.view(np.uint32), together[:1].view(np.uint32))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_later_keys_change_nothing(ops: _core.Ops, kv_dtype: str) -> None:
    """Slots after the last query hold NaN or the keys of later tokens; blocks may lie anywhere."""
    case = make_case(ops, kv_dtype, tokens=100, cap=20.0, window=50)
    for end in (1, 31, 33, 70):
        cache = PagedCache.filled(ops, kv_dtype, case.keys[:end], case.values[:end], seed=end)
        shorter = replace(case, cache=cache, queries=case.queries[:end])
        np.testing.assert_array_equal(shorter.attend(), case.attend(0, end))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", [5, 32, 64, 70])
def test_ring_of_blocks(ops: _core.Ops, kv_dtype: str, window: int) -> None:
    """A table narrower than the sequence is a ring: old pages are overwritten while the sequence goes on."""
    chunk, tokens = 16, 300
    case = make_case(ops, kv_dtype, tokens=tokens, window=window, cap=20.0, head_dim=16)
    whole = case.attend()
    width = -(-(window + chunk) // PAGE_TOKENS) + 1
    order = np.random.default_rng(3).permutation(width)
    ring = replace(case, cache=PagedCache(ops, kv_dtype, 1, 16, order, width))
    for begin in range(0, tokens, chunk):
        end = min(begin + chunk, tokens)
        ring.cache.write(begin, case.keys[begin:end], case.values[begin:end])
        np.testing.assert_array_equal(ring.attend(begin, end), whole[begin:end])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("begin", [64, 90, 95, 96, 97, 128])
def test_nothing_before_the_window_is_read(ops: _core.Ops, kv_dtype: str, begin: int) -> None:
    """Its pages may be gone, and the slots before it in its first page may hold anything."""
    window, end = 33, 130
    case = make_case(ops, kv_dtype, tokens=end, window=window, head_dim=20)
    expected = case.attend(begin, end)
    first_key = begin - window + 1
    nan = np.full((first_key, 1, 20), np.nan, np.float32)
    case.cache.write(0, nan, nan)
    case.cache.table[: first_key // PAGE_TOKENS] = UNTOUCHABLE
    np.testing.assert_array_equal(case.attend(begin, end), expected)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_sets_that_differ_in_int8_alone_give_the_same_bits(kv_dtype: str) -> None:
    """VNNI and matrix units sum the same integers as what their set adds them to."""
    outputs = {
        name: make_case(_core.Ops(name), kv_dtype, tokens=300, head_dim=80, group_heads=3, cap=25.0).attend()
        for name in _core.instruction_sets()
    }
    for plain_set, wider_set in (("avx2", "avx_vnni"), ("avx512_vnni", "avx512_amx")):
        if wider_set in outputs:
            np.testing.assert_array_equal(outputs[wider_set].view(np.uint32), outputs[plain_set].view(np.uint32))


def test_error_of_each_cache(ops: _core.Ops) -> None:
    """Against float64 on numbers that no cache has rounded: RMS error over RMS result, Gemma 2's head."""
    rng = np.random.default_rng(5)
    tokens, head_dim = 600, 256
    queries = 2 * rng.standard_normal((8, 2, head_dim), np.float32)
    keys, values = rng.standard_normal((2, tokens, 1, head_dim), np.float32)
    rule = {"scale": 1 / 16, "cap": 50.0}
    first = tokens - len(queries)
    exact = plain.attention(
        *(a.astype(np.float64) for a in (queries, keys[:, 0], values[:, 0])), first_position=first, **rule
    )
    bounds = {"float32": (0, 2e-6), "bfloat16": (1e-3, 5e-3), "int8": (8e-3, 2.5e-2)}
    for kv_dtype, (least, most) in bounds.items():
        out = PagedCache.filled(ops, kv_dtype, keys, values).attend(queries, first, **rule)
        error = math.sqrt(np.mean((out - exact) ** 2) / np.mean(exact**2))
        assert least < error < most, kv_dtype


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_unwritten_slots_show(ops: _core.Ops, kv_dtype: str) -> None:
    """A read of a slot that no token was written to makes the result NaN."""
    case = make_case(ops, kv_dtype, tokens=40, head_dim=16)
    late = case.cache.attend(case.queries[:1, 0], 40, **case.rule)
    assert np.isnan(late).all()


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_values_show(ops: _core.Ops, kv_dtype: str, bad: float) -> None:
    """Of one token, in one dimension: every query that sees it, and no other."""
    case = make_case(ops, kv_dtype, tokens=60, head_dim=16)
    expected = case.attend()
    case.values[30, 0, 5] = bad
    case.cache.write(30, case.keys[30:31], case.values[30:31])
    actual = case.attend()
    np.testing.assert_array_equal(actual[:30], expected[:30])
    assert not np.isfinite(actual[30:, :, 5]).any()


@pytest.mark.skipif(len(_core.instruction_sets()) == 1, reason="this machine has the scalar set only")
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_sets_agree_with_the_scalar_twin(kv_dtype: str) -> None:
    cases = [
        make_case(_core.Ops(name), kv_dtype, tokens=120, head_dim=80, window=50, cap=25.0)
        for name in _core.instruction_sets()
    ]
    twin = cases[0].attend()
    for case in cases[1:]:
        assert_close(case.op, case.attend(), twin, cases[0].usual())


def test_scores_of_any_size(ops: _core.Ops) -> None:
    """Softmax must neither overflow nor divide by zero, with scores up to 1e30 and with all of them below -1e4."""
    for size in (1e-30, 1.0, 1e4, 1e30):
        for sign in (1.0, -1.0):
            keys = np.full((40, 1, 4), sign * size, np.float32)
            values = np.arange(40, dtype=np.float32).repeat(4).reshape(40, 1, 4)
            cache = PagedCache.filled(ops, "float32", keys, values)
            out = cache.attend(np.ones((1, 1, 4), np.float32), 39, scale=1.0)
            np.testing.assert_allclose(out, 19.5, rtol=1e-6)


@pytest.mark.parametrize("cap", [1.0, 50.0, 55.4, 55.5, 80.0, 200.0])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_scores_at_the_cap(ops: _core.Ops, cap: float, side: float) -> None:
    """All of them near one end of what the cap allows, over four blocks: the weights must keep their ratios."""
    tokens = 1000
    rng = np.random.default_rng(4)
    keys = (side * (3 + rng.random((tokens, 1, 4), np.float32))).astype(np.float32)
    values = rng.standard_normal((tokens, 1, 4)).astype(np.float32)
    queries = np.full((1, 1, 4), cap / 4, np.float32)
    rule = {"scale": 1.0, "cap": cap, "window": None}
    cache = PagedCache.filled(ops, "float32", keys, values)
    exact, usual = (
        plain.attention(
            *(a.astype(dtype) for a in (queries, keys[:, 0], values[:, 0])), first_position=tokens - 1, **rule
        )
        for dtype in (np.float64, np.float32)
    )
    assert_close("attention", cache.attend(queries, tokens - 1, **rule), exact, usual)


def test_a_million_keys_at_the_cap(ops: _core.Ops) -> None:
    """Sums of weights without a maximum stay in range: every page of the table is the same one."""
    tokens = 2**20
    keys = np.full((PAGE_TOKENS, 1, 1), 1000.0, np.float32)
    values = np.full((PAGE_TOKENS, 1, 1), 1e6, np.float32)
    for side in (1.0, -1.0):
        cache = PagedCache(ops, "float32", 1, 1, np.zeros(tokens // PAGE_TOKENS, np.int32), 1)
        cache.write(0, side * keys, values)
        out = cache.attend(np.ones((1, 1, 1), np.float32), tokens - 1, scale=1.0, cap=55.0)
        np.testing.assert_allclose(out, 1e6, rtol=1e-4)


def test_weights_of_capped_scores(ops: _core.Ops) -> None:
    """Key 0 scores x and carries 1, key 1 scores 0 and carries 0: the result is w / (w + 1), w = exp(c tanh(x / c))."""
    cap = 50.0
    for x in np.concatenate([np.geomspace(1e-6, 500, 400), -np.geomspace(1e-6, 30, 200)]).astype(np.float32):
        keys = np.array([1, 0], np.float32).reshape(2, 1, 1)
        cache = PagedCache.filled(ops, "float32", keys, keys)
        out = cache.attend(np.full((1, 1, 1), x, np.float32), 1, scale=1.0, cap=cap).item()
        score = cap * math.tanh(float(x) / cap)
        # A float32 score has a rounding error of 6e-8 of itself; here three such, and the weight's own.
        assert out == pytest.approx(1 / (1 + math.exp(-score)), rel=4e-7 + 2e-7 * abs(min(score, 0.0)))


def test_exp_over_its_whole_range(ops: _core.Ops) -> None:
    """Key 0 scores x and carries 1; the p others score 0 and carry 0: the result is exp(x) / (exp(x) + p)."""
    scores = np.concatenate([-np.geomspace(1e-8, 87.0, 2000), [0.0, -88.0, -200.0, -np.inf]]).astype(np.float32)
    for x in scores[::7]:
        keys = np.array([1, 0, 0], np.float32).reshape(3, 1, 1)
        cache = PagedCache.filled(ops, "float32", keys, np.array([1, 0, 0], np.float32).reshape(3, 1, 1))
        out = cache.attend(np.full((1, 1, 1), max(x, -1e30), np.float32), 2, scale=1.0)
        expected = math.exp(x) / (math.exp(x) + 2) if x > -87.3 else 0.0
        # Exponents are rounded once where there is no fused multiply-add.
        rounding = 1e-7 * abs(float(x)) if ops.instruction_set == "scalar" else 0.0
        assert out.item() == pytest.approx(expected, rel=4e-7 + rounding, abs=0.0)


def test_nan_stays_in_its_own_query(ops: _core.Ops) -> None:
    case = make_case(ops, "float32", tokens=60, head_dim=16)
    expected = case.attend()
    case.queries[17, 0, 1, 3] = np.nan
    actual = case.attend()
    assert np.isnan(actual[17, 1]).all()
    actual[17, 1] = expected[17, 1]
    np.testing.assert_array_equal(actual, expected)
