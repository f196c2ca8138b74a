"""GeGLU with the tanh form of GELU."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2_fast import _core
from tests.ops import plain
from tests.support.closeness import assert_close, assert_rejected


def test_by_hand(ops: _core.Ops) -> None:
    """GELU keeps large numbers, drops large negative ones, and gelu(x) - gelu(-x) = x."""
    gate = np.array([0, 20, -20, 1, -1], np.float32)
    up = np.array([5, 2, 2, 1, 1], np.float32)
    out = ops.geglu(gate, up)
    np.testing.assert_array_equal(out[:3], [0, 40, 0])
    assert out[3] == pytest.approx(0.8411920, abs=1e-6)
    assert out[3] - out[4] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("count", [1, 7, 15, 16, 17, 31, 33, 1000, 2049])
def test_counts(ops: _core.Ops, count: int) -> None:
    rng = np.random.default_rng(count)
    gate, up = 3 * rng.standard_normal(count, np.float32), rng.standard_normal(count, np.float32)
    exact, usual = plain.exact_and_plain(plain.geglu, gate, up)
    assert_close("geglu", ops.geglu(gate, up), exact, usual)


def test_mutants_are_rejected(ops: _core.Ops) -> None:
    rng = np.random.default_rng(0)
    gate, up = 2 * rng.standard_normal(500, np.float32), rng.standard_normal(500, np.float32)
    exact, usual = plain.exact_and_plain(plain.geglu, gate, up)
    assert_close("geglu", ops.geglu(gate, up), exact, usual)
    assert_rejected("geglu", plain.gelu_erf(gate) * up, exact, usual)
    assert_rejected("geglu", ops.geglu(up, gate), exact, usual)
    assert_rejected("geglu", gate / (1 + np.exp(-1.702 * gate)) * up, exact, usual)


def test_error_over_the_whole_range(ops: _core.Ops) -> None:
    """The bound that cpu/vector_math.h states: 1.3e-7 max(1, |x|)."""
    x = np.concatenate([np.linspace(-12, 12, 200_001), [-1e4, -1e30, 1e4, 1e30]]).astype(np.float32)
    gelu = ops.geglu(x, np.ones_like(x)).astype(np.float64)
    with np.errstate(over="ignore"):
        exact = plain.gelu_tanh(x.astype(np.float64))
    assert (np.abs(gelu - exact) / np.maximum(1, np.abs(x))).max() < 1.3e-7


def test_nan_propagates(ops: _core.Ops) -> None:
    assert np.isnan(ops.geglu(np.full(3, np.nan, np.float32), np.ones(3, np.float32))).all()
