"""The short causal convolution of recurrent layers."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2_fast import _core
from gemma2_fast.errors import RequestError
from tests.ops import plain
from tests.support.closeness import assert_close, assert_rejected


def test_by_hand(recurrent_ops: _core.RecurrentOps) -> None:
    """The last tap meets the token itself, the tail stands before the first."""
    x = np.array([[1, 10], [2, 20], [3, 30]], np.float32)
    weights = np.array([[100, 1], [10, 0], [1, 0]], np.float32)
    out, tail = recurrent_ops.conv1d(x, weights, np.array([0.5, 0], np.float32), np.array([[8, 7], [9, 6]], np.float32))
    np.testing.assert_array_equal(out, np.float32([[891.5, 7], [912.5, 6], [123.5, 10]]))
    np.testing.assert_array_equal(tail, np.float32([[2, 20], [3, 30]]))


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 37])
@pytest.mark.parametrize(("channels", "taps"), [(1, 4), (7, 4), (16, 1), (17, 2), (31, 4), (256, 4), (64, 7)])
def test_shapes(recurrent_ops: _core.RecurrentOps, channels: int, taps: int, num_tokens: int) -> None:
    inputs = drawn(num_tokens, channels, taps)
    exact, usual = plain.exact_and_plain(plain.conv1d, *inputs)
    out, tail = recurrent_ops.conv1d(*inputs)
    assert_close("conv1d", out, exact, usual)
    x, _, _, before = inputs
    np.testing.assert_array_equal(tail, np.concatenate([before, x])[num_tokens:])


def drawn(num_tokens: int, channels: int, taps: int) -> list[plain.Floats]:
    rng = np.random.default_rng(channels + num_tokens)
    shapes = [(num_tokens, channels), (taps, channels), (channels,), (taps - 1, channels)]
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def test_in_pieces_bit_for_bit(recurrent_ops: _core.RecurrentOps) -> None:
    x, weights, bias, before = drawn(23, 37, 4)
    whole, last = recurrent_ops.conv1d(x, weights, bias, before)
    parts, tail = [], before
    for piece in np.split(x, [1, 3, 4, 12]):
        out, tail = recurrent_ops.conv1d(piece, weights, bias, tail)
        parts.append(out)
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(tail, last)


def test_mutants_are_rejected(recurrent_ops: _core.RecurrentOps) -> None:
    x, weights, bias, tail = drawn(20, 33, 4)
    exact, usual = plain.exact_and_plain(plain.conv1d, x, weights, bias, tail)
    assert_close("conv1d", recurrent_ops.conv1d(x, weights, bias, tail)[0], exact, usual)
    assert_rejected("conv1d", plain.conv1d(x, weights[::-1], bias, tail), exact, usual)
    assert_rejected("conv1d", plain.conv1d(x, weights, 0 * bias, tail), exact, usual)
    assert_rejected("conv1d", plain.conv1d(x, weights, bias, tail[::-1]), exact, usual)
    assert_rejected("conv1d", plain.conv1d(x, weights, bias, 0 * tail), exact, usual)


def test_shapes_that_do_not_fit(recurrent_ops: _core.RecurrentOps) -> None:
    x, weights, bias, tail = drawn(5, 8, 4)
    with pytest.raises(RequestError, match="tail"):
        recurrent_ops.conv1d(x, weights, bias, tail[1:])
    with pytest.raises(RequestError, match="bias"):
        recurrent_ops.conv1d(x, weights, bias[1:], tail)
