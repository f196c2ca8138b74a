"""RMSNorm, and RMSNorm added to the residual."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemma2_fast import _core
from tests.ops import plain
from tests.support.closeness import assert_close, assert_rejected

EPSILON = 1e-6


def test_by_hand(ops: _core.Ops) -> None:
    """The mean square of (1, 7) is 25 and of (3, 4, 0, 0) is 25 / 4."""
    x = np.array([[1, 7]], np.float32)
    np.testing.assert_array_equal(ops.rms_norm(x, np.array([1, 1], np.float32), 0.0), np.float32([[0.2, 1.4]]))
    x = np.array([[3, 4, 0, 0]], np.float32)
    gain = np.array([1, 2, 3, 4], np.float32)
    np.testing.assert_allclose(ops.rms_norm(x, gain, 0.0), [[1.2, 3.2, 0, 0]], rtol=1e-6)
    residual = np.array([[1, 1, 1, 1]], np.float32)
    np.testing.assert_allclose(ops.rms_norm_add(x, gain, 0.0, residual), [[2.2, 4.2, 1, 1]], rtol=1e-6)


def test_epsilon_keeps_zeros_finite(ops: _core.Ops) -> None:
    zeros = np.zeros((2, 5), np.float32)
    np.testing.assert_array_equal(ops.rms_norm(zeros, np.ones(5, np.float32), EPSILON), zeros)
    x = np.full((1, 4), 3, np.float32)  # mean square 9, and 9 + 7 = 16
    np.testing.assert_array_equal(ops.rms_norm(x, np.ones(4, np.float32), 7.0), x / 4)


@pytest.mark.parametrize("width", [1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 67, 640, 2304, 5377])
def test_widths(ops: _core.Ops, width: int) -> None:
    rng = np.random.default_rng(width)
    x = (rng.standard_normal((5, width)) * np.logspace(-3, 3, 5)[:, None]).astype(np.float32)
    gain = 1 + rng.standard_normal(width, np.float32)
    residual = rng.standard_normal((5, width), np.float32)
    exact, usual = plain.exact_and_plain(plain.rms_norm, x, gain, epsilon=EPSILON)
    normed = ops.rms_norm(x, gain, EPSILON)
    for row in range(5):  # rows differ in size by powers of ten
        assert_close("rms_norm", normed[row], exact[row], usual[row])
    added = ops.rms_norm_add(x, gain, EPSILON, residual)
    assert_close("rms_norm", added, residual + exact, residual + usual)
    np.testing.assert_array_equal(added, residual + normed)


def test_mutants_are_rejected(ops: _core.Ops) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 100), np.float32), rng.standard_normal(100, np.float32)
    exact, usual = plain.exact_and_plain(plain.rms_norm, x, 1 + weight, epsilon=EPSILON)
    assert_close("rms_norm", ops.rms_norm(x, 1 + weight, EPSILON), exact, usual)
    assert_rejected("rms_norm", ops.rms_norm(x, weight, EPSILON), exact, usual)  # w for 1 + w
    assert_rejected(
        "rms_norm", plain.rms_norm(x - x.mean(-1, keepdims=True), 1 + weight, epsilon=EPSILON), exact, usual
    )
    assert_rejected("rms_norm", ops.rms_norm(x, 1 + weight, 1e-4), exact, usual)
    assert_rejected("rms_norm", x / (np.sqrt(np.mean(x * x, -1, keepdims=True)) + 1e-3) * (1 + weight), exact, usual)


def test_rows_do_not_depend_on_each_other(ops: _core.Ops) -> None:
    rng = np.random.default_rng(1)
    x, gain = rng.standard_normal((9, 77), np.float32), rng.standard_normal(77, np.float32)
    together = ops.rms_norm(x, gain, EPSILON)
    for row in range(9):
        np.testing.assert_array_equal(ops.rms_norm(x[row : row + 1], gain, EPSILON)[0], together[row])


def test_nan_and_infinity_stay_visible(ops: _core.Ops) -> None:
    x = np.ones((2, 20), np.float32)
    x[0, 19] = math.nan
    out = ops.rms_norm(x, np.ones(20, np.float32), EPSILON)
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()
