"""Norms, in Triton's interpreter, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels import rms_norm as kernel
from tests.ops import plain
from tests.ops.plain import Floats
from tests.support.closeness import assert_close, assert_rejected

EPSILON = 1e-6


def draw(*shape: int) -> Floats:
    return np.random.default_rng(shape[-1]).standard_normal(shape, np.float32)


def rms_norm(x: Floats, weight: Floats) -> Floats:
    out = torch.full(x.shape, torch.nan)
    kernel.rms_norm(torch.from_numpy(x), torch.from_numpy(weight), EPSILON, out)
    return out.numpy()


def rms_norm_add(branch: Floats, after: Floats | None, residual: Floats, before: Floats) -> tuple[Floats, Floats]:
    """The updated residual, and its norm."""
    total, out = torch.from_numpy(residual.copy()), torch.full(branch.shape, torch.nan)
    gains = (None if after is None else torch.from_numpy(after), torch.from_numpy(before))
    kernel.rms_norm_add(torch.from_numpy(branch), gains[0], total, gains[1], EPSILON, out)
    return total.numpy(), out.numpy()


def between(branch: Floats, after: Floats | None, residual: Floats, before: Floats) -> tuple[Floats, Floats]:
    """The same, plainly, in the arrays' dtype."""
    added = branch if after is None else plain.rms_norm(branch, 1 + after, epsilon=EPSILON)
    total = residual + added
    return total, plain.rms_norm(total, 1 + before, epsilon=EPSILON)


def test_by_hand() -> None:
    """The mean square of 3 and 4 and six zeros is 25 / 8; a stored weight of 1 doubles."""
    x = np.array([[3, 4, 0, 0, 0, 0, 0, 0]], np.float32)
    out = rms_norm(x, np.array([0, 1, 0, 0, 0, 0, 0, 0], np.float32))
    np.testing.assert_allclose(out[0, :2], [3 / np.sqrt(25 / 8), 8 / np.sqrt(25 / 8)], rtol=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (3, 7), (2, 64), (5, 640)])
def test_rms_norm(tokens: int, width: int) -> None:
    x, weight = 3 * draw(tokens, width), 0.3 * draw(width)
    exact, usual = plain.exact_and_plain(plain.rms_norm, x, 1 + weight, epsilon=EPSILON)
    assert_close("rms_norm", rms_norm(x, weight), exact, usual)
    assert_rejected("rms_norm", rms_norm(x, weight - 1), exact, usual)


def test_a_dependent_kernel_waits_for_nothing_where_it_is_interpreted() -> None:
    x, weight = torch.from_numpy(draw(2, 64)), torch.from_numpy(draw(64))
    out = torch.full(x.shape, torch.nan)
    kernel.rms_norm_kernel[(2,)](x, weight, out, 64, EPSILON, BLOCK=64, DEPENDENT=True)
    np.testing.assert_array_equal(out.numpy(), rms_norm(x.numpy(), weight.numpy()))


@pytest.mark.parametrize("has_after", [False, True])
@pytest.mark.parametrize(("tokens", "width"), [(1, 2), (3, 65), (2, 640)])
def test_between_two_branches(has_after: bool, tokens: int, width: int) -> None:
    branch, residual = 3 * draw(tokens, width), 2 * draw(tokens, width)[::-1].copy()
    after, before = (0.3 * draw(width) if has_after else None), 0.3 * draw(width)[::-1].copy()
    arrays = (branch, after, residual, before)
    exact = between(*(None if a is None else a.astype(np.float64) for a in arrays))
    for ours, ideal, usual in zip(rms_norm_add(*arrays), exact, between(*arrays), strict=True):
        assert_close("rms_norm", ours, ideal, usual)
    swapped = rms_norm_add(branch, None if has_after else before, residual, before)
    assert_rejected("rms_norm", swapped[1], exact[1], between(*arrays)[1])
