"""add and scale: one rounding an element, so the result is NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2_fast import _core


def test_by_hand(ops: _core.Ops) -> None:
    x, residual = np.array([1, 2, 3], np.float32), np.array([10, 20, 30], np.float32)
    np.testing.assert_array_equal(ops.add(x, residual), np.float32([11, 22, 33]))
    np.testing.assert_array_equal(ops.scale(x, 0.5), np.float32([0.5, 1, 1.5]))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 15, 16, 17, 1003])
def test_counts(ops: _core.Ops, count: int) -> None:
    rng = np.random.default_rng(count)
    x, residual = rng.standard_normal(count, np.float32), rng.standard_normal(count, np.float32)
    np.testing.assert_array_equal(ops.add(x, residual), x + residual)
    np.testing.assert_array_equal(ops.scale(x, 48.0), x * np.float32(48))
