"""Soft cap: cap * tanh(x / cap)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemma2_fast import _core
from tests.ops import plain
from tests.support.closeness import assert_close, assert_rejected


def test_by_hand(ops: _core.Ops) -> None:
    """tanh(ln 3 / 2) is 1 / 2; far outside, the cap itself remains."""
    x = np.array([0, 10 * math.log(3) / 2, 1e4, -1e4], np.float32)
    np.testing.assert_allclose(ops.softcap(x, 10.0), [0, 5, 10, -10], rtol=1e-6)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 33, 2049])
@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
def test_counts(ops: _core.Ops, count: int, cap: float) -> None:
    x = (2 * cap * np.random.default_rng(count).standard_normal(count)).astype(np.float32)
    exact, usual = plain.exact_and_plain(plain.softcap, x, cap=cap)
    assert_close("softcap", ops.softcap(x, cap), exact, usual)


def test_mutants_are_rejected(ops: _core.Ops) -> None:
    x = (40 * np.random.default_rng(0).standard_normal(500)).astype(np.float32)
    exact, usual = plain.exact_and_plain(plain.softcap, x, cap=30.0)
    assert_close("softcap", ops.softcap(x, 30.0), exact, usual)
    for mutant in (
        x,
        np.clip(x, -30, 30),
        ops.softcap(x, 50.0),
        np.tanh(x / 30),
        ops.softcap(ops.softcap(x, 30.0), 30.0),
    ):
        assert_rejected("softcap", mutant, exact, usual)


def test_error_over_the_whole_range(ops: _core.Ops) -> None:
    """The bound that cpu/vector_math.h states for tanh: 2e-7 relative, also of tiny numbers; odd; 1 from 10 on."""
    x = np.concatenate([np.geomspace(1e-38, 1e38, 200_001), [1e-42, np.inf]]).astype(np.float32)
    tanh = ops.softcap(x, 1.0).astype(np.float64)
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(tanh - exact) / exact).max() < 2e-7
    assert (tanh[x >= 10] == 1).all()
    np.testing.assert_array_equal(ops.softcap(-x, 1.0), -tanh)


def test_nan_propagates(ops: _core.Ops) -> None:
    assert np.isnan(ops.softcap(np.full(3, np.nan, np.float32), 30.0)).all()
