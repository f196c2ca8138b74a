"""quantize_rows: activations as integers in groups of 128 columns; two that stand out keep fifteen bits."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core

GROUP = 128


def expected(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """scales [groups, T] and integers [groups, T, 128] by the formula, in float32 as the kernel."""
    tokens, cols = x.shape
    groups = -(-cols // GROUP)
    padded = np.zeros((tokens, groups * GROUP), dtype=np.float32)
    padded[:, :cols] = x
    grouped = padded.reshape(tokens, groups, GROUP).swapaxes(0, 1)
    ordered = np.sort(np.abs(grouped), axis=2)
    first, third = ordered[..., -1], ordered[..., -3]
    stands_out = first > 2 * third
    by_third = stands_out & (third * np.float32(128) >= first)
    unit = np.where(by_third, third, first)
    most = np.where(stands_out & ~by_third, np.float32(127 * 128), np.float32(127))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = np.where(unit > 0, most / unit, np.float32(0))
    return np.where(unit > 0, unit / most, 0), np.rint(grouped * factor[..., None]).astype(np.int32)


def test_by_hand(ops: _core.Ops) -> None:
    x = np.zeros((1, 130), dtype=np.float32)
    x[0, :5] = [127, -127, 127, 2.5, 3.5]  # ties to even
    x[0, 128] = 0.5
    scales, integers, sums = ops.quantize_rows(x)
    assert integers.shape == (2, 1, 128)
    assert integers[0, 0, :6].tolist() == [127, -127, 127, 2, 4, 0]
    assert integers[1, 0].tolist() == [127 * 128, *[0] * 127]  # alone in its group: fifteen bits
    assert scales.tolist() == [[1.0], [np.float32(0.5) / np.float32(127 * 128)]]
    assert sums.tolist() == [[133], [127 * 128]]


def test_two_huge_values_leave_the_others_their_precision(ops: _core.Ops) -> None:
    rng = np.random.default_rng(3)
    x = rng.uniform(-1, 1, (4, 128)).astype(np.float32)
    x[:, 37], x[:, 38] = 60, -90
    scales, integers, _ = ops.quantize_rows(x)
    error = np.abs(integers[0] * scales[0][:, None] - x)
    assert error.max() < 0.51 / 127
    assert np.abs(integers[0, :, 37:39]).min() > 127


def test_values_that_hardly_stand_out_are_bytes(ops: _core.Ops) -> None:
    x = np.zeros((2, 128), dtype=np.float32)
    x[:, :3] = 2
    x[0, 7], x[1, 7] = 4, 4.25
    scales, integers, _ = ops.quantize_rows(x)
    assert integers[0, :, [0, 7]].T.tolist() == [[64, 127], [127, 270]]
    assert scales[0].tolist() == [np.float32(4) / np.float32(127), np.float32(2) / np.float32(127)]


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 127, 128, 129, 330, 640])
def test_formula(ops: _core.Ops, cols: int) -> None:
    rng = np.random.default_rng(cols)
    x = (rng.standard_normal((40, cols)) * 10.0 ** rng.uniform(-6, 6, (40, 1))).astype(np.float32)
    x[3] = 0
    x[10:, rng.integers(cols)] *= 40
    x[20:, rng.integers(cols)] *= -3000
    x[30:, rng.integers(cols)] *= 200
    scales, integers, sums = ops.quantize_rows(x)
    wanted_scales, wanted_integers = expected(x)
    np.testing.assert_array_equal(integers, wanted_integers)
    np.testing.assert_array_equal(scales, wanted_scales)
    np.testing.assert_array_equal(sums, integers.sum(axis=2, dtype=np.int32))
    assert np.abs(integers).max() <= 127 * 128


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 77, 127])
def test_what_is_not_finite_shows(ops: _core.Ops, value: float, place: int) -> None:
    x = np.ones((2, 256), dtype=np.float32)
    x[1, place] = value
    scales, integers, sums = ops.quantize_rows(x)
    assert np.isnan(scales[0, 1])
    assert not integers[0, 1].any()
    assert sums[0, 1] == 0
    assert np.isfinite(np.delete(scales.ravel(), 1)).all()


def test_too_small_to_scale_is_zero(ops: _core.Ops) -> None:
    scales, integers, _ = ops.quantize_rows(np.full((1, 128), 1e-38, dtype=np.float32))
    assert not integers.any()
    assert not scales.any()
