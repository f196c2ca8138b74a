"""Products of many tokens, in Triton's interpreter, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels import matmul_tiled as kernel
from tests.ops import plain
from tests.ops.plain import Floats
from tests.support.closeness import assert_close, assert_rejected
from tests.triton_kernels.stored_rows import StoredRows, before_nan

SMALL = {"tile_tokens": 16, "tile_rows": 32, "cols": 64}


def matmul(x: Floats, weight: Any, scales: Floats | None = None, **tile: int) -> Floats:
    out = torch.full((len(x), len(weight)), torch.nan)
    given = None if scales is None else torch.from_numpy(scales)
    kernel.matmul_tiled(torch.from_numpy(x), torch.from_numpy(weight), out, given, **tile)
    return out.numpy()


def product(x: Floats, weight: Floats) -> Floats:
    return x @ weight.T


def draw(*shape: int) -> Floats:
    return np.random.default_rng(shape).standard_normal(shape, np.float32)


def test_by_hand() -> None:
    """Row r of the matrix is one at column r: out is x, whatever tile it lies in."""
    x = np.arange(20 * 40, dtype=np.float32).reshape(20, 40)
    np.testing.assert_array_equal(matmul(x, np.eye(40, dtype=np.float32), **SMALL), x)
    scales = np.arange(1, 41, dtype=np.float32)[:, None]
    ours = matmul(x, np.eye(40, dtype=np.int8), scales, **{**SMALL, "cols": 128})
    np.testing.assert_array_equal(ours, x * np.arange(1, 41, dtype=np.float32))


@pytest.mark.parametrize("tokens", [17, 32, 150])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (32, 64), (33, 65), (70, 200)])
def test_shapes(tokens: int, rows: int, cols: int) -> None:
    """Tiles of 16 tokens, 32 rows and 64 columns: one more, as many, and ten tiles of tokens, of which eight are
    neighbours."""
    x, weight = draw(tokens, cols), draw(rows, cols)
    exact, usual = plain.exact_and_plain(product, x, weight)
    assert_close("matmul triton", matmul(x, weight, **SMALL), exact, usual)


def test_bias() -> None:
    x, weight, bias = draw(20, 64), draw(70, 64), draw(70)
    out = torch.full((20, 70), torch.nan)
    given = (torch.from_numpy(x), torch.from_numpy(weight), out)
    kernel.matmul_tiled(*given, bias=torch.from_numpy(bias), **SMALL)
    np.testing.assert_array_equal(out.numpy(), matmul(x, weight, **SMALL) + bias)


@pytest.mark.parametrize("cols", [128, 200, 384])
@pytest.mark.parametrize("name", ["INT8_G128", "INT4_G32"])
def test_codes(name: str, cols: int) -> None:
    x, stored = draw(20, cols), StoredRows.make(name, 40, cols)
    exact, usual = plain.exact_and_plain(product, x, stored.exact)

    def ours(arrays: dict[str, torch.Tensor]) -> Floats:
        out = torch.full((20, 40), torch.nan)
        kernel.matmul_tiled(before_nan(torch.from_numpy(x)), out=out, **arrays, **{**SMALL, "cols": 128})
        return out.numpy()

    assert_close("matmul triton", ours(stored.arrays), exact, usual)
    for wrong in stored.mutants():
        assert_rejected("matmul triton", ours(wrong), exact, usual)


def test_a_token_does_not_feel_the_others() -> None:
    x, weight = draw(50, 150), draw(33, 150)
    np.testing.assert_array_equal(matmul(x[:20], weight, **SMALL), matmul(x, weight, **SMALL)[:20])
