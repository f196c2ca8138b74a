"""Rotary position embedding on the halves of the rotated dims."""

from __future__ import annotations

import numpy as np
import pytest

from gemma2_fast import _core
from tests.ops import plain
from tests.support.closeness import assert_close, assert_rejected

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def angles(tokens: int, pairs: int, base: float = 10_000.0) -> tuple[Floats, Floats]:
    turn = np.arange(tokens)[:, None] * base ** (-np.arange(pairs)[None] / pairs)
    return np.cos(turn).astype(np.float32), np.sin(turn).astype(np.float32)


def test_by_hand(ops: _core.Ops) -> None:
    """A quarter turn takes (a, b) to (-b, a); dims 0 and 2 are a pair, and so are 1 and 3; dim 4 is not rotated."""
    x = np.array([[[1, 2, 3, 4, 5]]], np.float32)
    quarter = np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32)
    np.testing.assert_array_equal(ops.rope(x, *quarter), np.float32([[[-3, -4, 1, 2, 5]]]))
    first_pair_only = np.array([[0, 1]], np.float32), np.array([[1, 0]], np.float32)
    np.testing.assert_array_equal(ops.rope(x, *first_pair_only), np.float32([[[-3, 2, 1, 4, 5]]]))


@pytest.mark.parametrize(
    ("head_dim", "pairs"),
    [(2, 1), (3, 1), (8, 4), (16, 3), (33, 16), (64, 32), (67, 33), (80, 40), (128, 32), (256, 128)],
)
def test_shapes(ops: _core.Ops, head_dim: int, pairs: int) -> None:
    x = np.random.default_rng(head_dim).standard_normal((7, 3, head_dim), np.float32)
    cos, sin = angles(7, pairs)
    exact, usual = plain.exact_and_plain(plain.rope, x, cos, sin)
    out = ops.rope(x, cos, sin)
    assert_close("rope", out, exact, usual)
    np.testing.assert_array_equal(out[..., 2 * pairs :], x[..., 2 * pairs :])


def test_mutants_are_rejected(ops: _core.Ops) -> None:
    x = np.random.default_rng(0).standard_normal((50, 2, 64), np.float32)
    cos, sin = angles(50, 32)
    exact, usual = plain.exact_and_plain(plain.rope, x, cos, sin)
    assert_close("rope", ops.rope(x, cos, sin), exact, usual)
    assert_rejected("rope", plain.rope(x, cos, sin, interleaved=True), exact, usual)
    assert_rejected("rope", ops.rope(x, cos, -sin), exact, usual)
    assert_rejected("rope", ops.rope(x, *angles(50, 32, base=1_000_000.0)), exact, usual)
    assert_rejected("rope", ops.rope(x, *(np.roll(a, 1, axis=0) for a in (cos, sin))), exact, usual)
