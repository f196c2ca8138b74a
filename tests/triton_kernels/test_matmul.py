"""Products of few tokens, in Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels import matmul as kernel
from tests.ops import plain
from tests.ops.plain import Floats
from tests.support.closeness import assert_close, assert_rejected

# gelu(x) of a large negative x divides by infinity, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


def matmul(x: Floats, weight: Any, num_rows: int, scales: Floats | None = None, **how: Any) -> Floats:
    out = torch.full((len(x), num_rows), torch.nan)
    given = None if scales is None else torch.from_numpy(scales)
    kernel.matmul(torch.from_numpy(x), torch.from_numpy(weight), out, given, **how)
    return out.numpy()


def product(x: Floats, weight: Floats, geglu: bool = False) -> Floats:
    out = x @ weight.T
    half = len(weight) // 2
    return plain.geglu(out[:, :half], out[:, half:]) if geglu else out


def draw(*shape: int) -> Floats:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


@pytest.mark.parametrize("tokens", [1, 3])
def test_by_hand(tokens: int) -> None:
    """Rows 1 2 3 and 4 5 6 times 1 10 100; as int8 with scales of a half and of two."""
    x = np.tile(np.array([1, 10, 100], np.float32), (tokens, 1))
    codes = np.array([[1, 2, 3], [4, 5, 6]], np.int8)
    np.testing.assert_array_equal(matmul(x, codes.astype(np.float32), 2, rows=16, cols=64), [[321, 654]] * tokens)
    scales = np.array([[0.5], [2]], np.float32)
    np.testing.assert_array_equal(matmul(x, codes, 2, scales, rows=16, cols=128), [[160.5, 1308]] * tokens)


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 8, 16])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (16, 64), (17, 65), (40, 200)])
def test_shapes(tokens: int, rows: int, cols: int, geglu: bool) -> None:
    """Blocks of 16 rows and 64 columns: fewer, as many, one more, several."""
    x, weight = draw(tokens, cols), draw(rows * (1 + geglu), cols)
    exact, usual = plain.exact_and_plain(product, x, weight, geglu=geglu)
    ours = matmul(x, weight, rows, geglu=geglu, rows=16, cols=64)
    assert_close("matmul triton", ours, exact, usual)


@pytest.mark.parametrize("geglu", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(("cols", "block"), [(128, 128), (200, 128), (384, 128), (384, 256), (520, 512)])
def test_int8(tokens: int, cols: int, block: int, geglu: bool) -> None:
    """Groups of 128, the last of which may be shorter; of one token a block may hold several."""
    block = block if tokens == 1 else 128
    rows, groups = 20, -(-cols // 128)
    rng = np.random.default_rng(cols)
    codes = rng.integers(-127, 128, (rows * (1 + geglu), cols)).astype(np.int8)
    scales = rng.uniform(0.01, 0.02, (len(codes), groups)).astype(np.float32)
    weight = codes * np.repeat(scales, 128, axis=1)[:, :cols]
    x = draw(tokens, cols)
    exact, usual = plain.exact_and_plain(product, x, weight, geglu=geglu)
    ours = matmul(x, codes, rows, scales, geglu=geglu, rows=16, cols=block)
    assert_close("matmul triton", ours, exact, usual)
    for axis in (0, 1) if groups > 1 else (0,):
        wrong_group = codes * np.repeat(np.roll(scales, 1, axis), 128, axis=1)[:, :cols]
        assert_rejected("matmul triton", product(x, wrong_group, geglu), exact, usual)


@pytest.mark.parametrize("wanted", [[4], [0, 4, 2], [6, 6]])
def test_gathered_rows(wanted: list[int]) -> None:
    """As where only some tokens' logits are wanted: the same numbers as of those rows alone."""
    x, weight = draw(7, 150), draw(33, 150)
    alone = matmul(x[wanted], weight, 33, rows=16, cols=64)
    out = torch.full((len(wanted), 33), torch.nan)
    chosen = torch.tensor(wanted, dtype=torch.int32)
    given = (torch.from_numpy(x), torch.from_numpy(weight), out)
    kernel.matmul(*given, row_index=chosen, rows=16, cols=64)
    np.testing.assert_array_equal(out.numpy(), alone)


def test_gate_comes_first() -> None:
    x, weight = draw(2, 96), draw(24, 96)
    exact, usual = plain.exact_and_plain(product, x, weight, geglu=True)
    swapped = np.concatenate([weight[12:], weight[:12]])
    assert_rejected("matmul triton", matmul(x, swapped, 12, geglu=True, rows=16, cols=64), exact, usual)


def test_a_token_does_not_feel_the_others() -> None:
    x, weight = draw(9, 150), draw(33, 150)
    together = matmul(x, weight, 33, rows=16, cols=64)
    np.testing.assert_array_equal(matmul(x[:4], weight, 33, rows=16, cols=64), together[:4])


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 16 tokens at once, got 17"):
        matmul(draw(17, 64), draw(8, 64), 8)
