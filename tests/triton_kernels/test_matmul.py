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
from tests.triton_kernels.stored_rows import StoredRows, before_nan

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
@pytest.mark.parametrize("name", ["INT8_G128", "INT4_G32"])
@pytest.mark.parametrize(("cols", "block"), [(128, 128), (200, 128), (384, 128), (384, 256), (520, 512)])
def test_codes(name: str, cols: int, block: int, tokens: int, geglu: bool) -> None:
    """Groups of 128, the last of which may be shorter; of one token a block may hold several."""
    rows, x = 20, draw(tokens, cols) / 4  # gates of a few units: far out, the exponent's rounding is all there is
    stored = StoredRows.make(name, rows * (1 + geglu), cols)
    exact, usual = plain.exact_and_plain(product, x, stored.exact, geglu=geglu)

    def ours(arrays: dict[str, torch.Tensor]) -> Floats:
        out = torch.full((tokens, rows), torch.nan)
        how = {"geglu": geglu, "rows": 16, "cols": block if tokens == 1 else 128}
        kernel.matmul(before_nan(torch.from_numpy(x)), out=out, **arrays, **how)
        return out.numpy()

    assert_close("matmul triton", ours(stored.arrays), exact, usual)
    for wrong in stored.mutants() if cols == 384 else ():
        assert_rejected("matmul triton", ours(wrong), exact, usual)


def test_int4_by_hand() -> None:
    """A scale of 2; codes 9 and 15, 1 and 7 after the shift, of columns 0 and 64, factors 1 and -3 of their groups."""
    codes, factors = np.full((1, 1, 64), 0x88, np.uint8), np.full((1, 1, 2), 0x88, np.uint8)
    codes[0, 0, 0], factors[0, 0, 0] = 0xF9, 0x59
    arrays = (torch.from_numpy(codes), torch.tensor([[2.0]]), torch.from_numpy(factors))
    for tokens in (1, 2):
        x = torch.zeros((tokens, 128))
        x[:, 0], x[:, 64] = 10, 100
        out = torch.full((tokens, 1), torch.nan)
        kernel.matmul(x, arrays[0], out, *arrays[1:], rows=16, cols=128)
        assert out.flatten().tolist() == [2 * 1 * 1 * 10 + 2 * -3 * 7 * 100] * tokens


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


@pytest.mark.parametrize("tokens", [1, 3])
def test_bias(tokens: int) -> None:
    """Added to each product, of gate and of up to its own, before the activation."""
    x, weight, bias = draw(tokens, 96), draw(34, 96), draw(34)

    def biased(x: Floats, weight: Floats, bias: Floats, geglu: bool) -> Floats:
        out = x @ weight.T + bias
        return plain.geglu(out[:, :17], out[:, 17:]) if geglu else out

    for geglu in (False, True):
        exact, usual = plain.exact_and_plain(biased, x, weight, bias, geglu=geglu)
        how: dict[str, Any] = {"bias": torch.from_numpy(bias), "rows": 16, "cols": 64}
        assert_close("matmul triton", matmul(x, weight, 34 // (1 + geglu), geglu=geglu, **how), exact, usual)
        how["bias"] = torch.from_numpy(np.roll(bias, 17))
        assert_rejected("matmul triton", matmul(x, weight, 34 // (1 + geglu), geglu=geglu, **how), exact, usual)


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
