"""matmul of every weight format on every instruction set: close to the exact product, same bits however it is cut."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.errors import RequestError
from gemma2_fast.quant import FORMATS
from tests.ops.stored_weights import (
    INSTRUCTION_SETS,
    ROWS_OF_ANY_LENGTH,
    Array32,
    Array64,
    activations,
    stored_matrix,
    unpacked,
)
from tests.support.closeness import assert_close, assert_rejected

# A register tile has 4 rows, a task 64; columns cross one tile's panel (1024) and end inside a vector where they can.
ROWS = [1, 3, 4, 5, 64, 67]
PLAIN_COLS = [1, 7, 16, 17, 67, 1031]
TOKENS = [*range(1, 18), 64, 67]


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    data: NDArray[np.uint8]
    weights: Array32
    x: Array32

    def run(
        self, ops: _core.Ops, begin: int = 0, end: int | None = None, first: int = 0, last: int | None = None
    ) -> Array32:
        """Rows [first, last) of tokens [begin, end)."""
        return ops.matmul(self.name, self.data, self.rows, self.x[begin:end], first, last)

    def exact(self, weights: Array32 | None = None) -> Array64:
        stored = self.weights if weights is None else weights
        return self.x.astype(np.float64) @ stored.astype(np.float64).T

    def plain(self) -> Array32:
        """One float32 sum over the columns in order, rounded after each product and each addition."""
        total = np.zeros((len(self.x), self.rows), dtype=np.float32)
        for k in range(self.x.shape[1]):
            total += self.x[:, k, None] * self.weights[:, k]
        return total


def make_case(name: str, rows: int, cols: int, num_tokens: int, seed: int = 0) -> Case:
    data = stored_matrix(name, rows, cols, seed)
    return Case(name, rows, data, unpacked(name, data, rows, cols), activations(num_tokens, cols, seed + 1))


def columns_of(name: str) -> list[int]:
    block = FORMATS[name].block_weights
    return PLAIN_COLS if name in ROWS_OF_ANY_LENGTH else [block, 3 * block, 1024 + block]


def test_by_hand(ops: _core.Ops) -> None:
    weights = np.array([[1, 2, 3], [0, -1, 0.5]], dtype=np.float32)
    x = np.array([[1, 1, 1], [2, 0, -4]], dtype=np.float32)
    out = ops.matmul("F32", weights.view(np.uint8).ravel(), 2, x)
    assert out.tolist() == [[6.0, -0.5], [-10.0, -2.0]]


def test_q8_0_by_hand(ops: _core.Ops) -> None:
    # Weights 0.5 * (0, 1, .. 31) against ones: 0.5 * 496.
    scale = np.array([0.5], dtype=np.float16).view(np.uint8)
    data = np.concatenate([scale, np.arange(32, dtype=np.uint8)])
    assert ops.matmul("Q8_0", data, 1, np.ones((1, 32), dtype=np.float32)).tolist() == [[248.0]]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", ROWS)
def test_close_to_exact(ops: _core.Ops, name: str, rows: int) -> None:
    for cols in columns_of(name):
        case = make_case(name, rows, cols, num_tokens=37, seed=rows)
        assert_close("matmul", case.run(ops), case.exact(), case.plain())


@pytest.mark.parametrize("name", FORMATS)
def test_close_to_the_scalar_twin(ops: _core.Ops, name: str) -> None:
    cols = columns_of(name)[-1]
    case = make_case(name, 67, cols, num_tokens=19)
    assert_close("matmul", case.run(ops), case.exact(), case.run(_core.Ops("scalar")))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("wide", [False, True])
def test_same_bits_however_tokens_are_grouped(ops: _core.Ops, name: str, wide: bool) -> None:
    case = make_case(name, 69, columns_of(name)[-1 if wide else 1], num_tokens=67)
    whole = case.run(ops)
    for num_tokens in TOKENS:
        for begin in (0, 67 - num_tokens):
            part = case.run(ops, begin, begin + num_tokens)
            np.testing.assert_array_equal(part, whole[begin : begin + num_tokens])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tokens", [1, 3, 5, 17])
def test_same_bits_however_rows_are_split(ops: _core.Ops, name: str, num_tokens: int) -> None:
    case = make_case(name, 139, columns_of(name)[-1], num_tokens)
    whole = case.run(ops)
    for cuts in ([0, 1, 139], [0, 4, 8, 139], [0, 3, 67, 131, 138, 139], [0, 64, 128, 139]):
        for first, last in pairwise(cuts):
            part = case.run(ops, first=first, last=last)
            np.testing.assert_array_equal(part[:, first:last], whole[:, first:last])
            assert np.isnan(part[:, :first]).all()  # and nothing else is written
            assert np.isnan(part[:, last:]).all()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "BF16"])
@pytest.mark.parametrize("num_tokens", [1, 6, 13])
def test_same_bits_with_two_threads(name: str, num_tokens: int) -> None:
    case = make_case(name, 1000, 1024, num_tokens)
    for instruction_set in INSTRUCTION_SETS:
        alone, together = (_core.Ops(instruction_set, threads) for threads in (1, 2))
        np.testing.assert_array_equal(case.run(together), case.run(alone))


def test_a_row_too_wide_for_one_panel(ops: _core.Ops) -> None:
    """Of 9216 columns few rows fit a panel, so that a task takes several."""
    case = make_case("Q8_0", 30, 9216, num_tokens=7)
    together = case.run(ops)
    assert_close("matmul", together, case.exact(), case.plain())
    for token in range(7):
        np.testing.assert_array_equal(case.run(ops, token, token + 1)[0], together[token])


@pytest.mark.parametrize("num_tokens", [1, 4, 7])
@pytest.mark.parametrize("name", ["F32", "BF16", "Q6_K"])
def test_alignment_does_not_matter(ops: _core.Ops, name: str, num_tokens: int) -> None:
    case = make_case(name, 5, columns_of(name)[-1], num_tokens)
    expected = case.run(ops)
    for offset in range(4):
        moved = np.empty(len(case.data) + 4, dtype=np.uint8)[offset:][: len(case.data)]
        moved[:] = case.data
        np.testing.assert_array_equal(ops.matmul(name, moved, case.rows, case.x), expected)


@pytest.mark.parametrize("num_tokens", [2, 9])
def test_not_a_number_stays_in_its_row_and_token(ops: _core.Ops, num_tokens: int) -> None:
    case = make_case("F32", 7, 21, num_tokens)
    expected = case.run(ops)
    case.data.reshape(7, 84)[4, 80:] = np.array([np.nan], dtype=np.float32).view(np.uint8)  # the row's last weight
    case.x[1, 20] = np.inf
    actual = case.run(ops)
    spoilt = np.zeros(actual.shape, dtype=bool)
    spoilt[:, 4] = spoilt[1] = True
    np.testing.assert_array_equal(np.isfinite(actual), ~spoilt)
    np.testing.assert_array_equal(actual[~spoilt], expected[~spoilt])


def swapped_nibbles(case: Case) -> Array32:
    """The weights if a byte's high nibble came before its low one (groups of 32 change places in K formats)."""
    half = 16 if FORMATS[case.name].block_weights == 32 else 32
    shape = case.weights.shape
    return case.weights.reshape(*shape[:-1], -1, 2, half)[..., ::-1, :].reshape(shape)


def wrong_scale(case: Case) -> Array32:
    """The last block of every row by the scale of the first."""
    block = FORMATS[case.name].block_weights
    wrong = case.weights.copy()
    wrong[:, -block:] *= 1.001
    return wrong


def dropped_columns(case: Case) -> Array32:
    """The last vector of every row left out."""
    wrong = case.weights.copy()
    wrong[:, -(case.weights.shape[1] % 16 or 16) :] = 0
    return wrong


def next_row(case: Case) -> Array32:
    return np.roll(case.weights, 1, axis=0)


@pytest.mark.parametrize("mutant", [swapped_nibbles, wrong_scale, dropped_columns, next_row])
@pytest.mark.parametrize("name", ["Q4_0", "Q5_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_the_bound_rejects_mutants(name: str, mutant: object) -> None:
    assert callable(mutant)
    case = make_case(name, 67, 1024 + FORMATS[name].block_weights, num_tokens=5)
    assert_rejected("matmul", case.exact(mutant(case)), case.exact(), case.plain())


def test_the_bit_comparison_rejects_another_order(ops: _core.Ops) -> None:
    """Columns reversed give the same exact product with other roundings: the bits must tell."""
    case = make_case("F32", 16, 1031, num_tokens=8)
    turned = np.ascontiguousarray(case.weights[:, ::-1]).view(np.uint8).ravel()
    other = ops.matmul("F32", turned, 16, np.ascontiguousarray(case.x[:, ::-1]))
    assert not np.array_equal(other, case.run(ops))


def test_refusals(ops: _core.Ops) -> None:
    data = np.zeros(4 * 34, dtype=np.uint8)
    x = np.zeros((2, 32), dtype=np.float32)
    with pytest.raises(RequestError, match="expected 170 bytes, got 136"):
        ops.matmul("Q8_0", data, 5, x)
    with pytest.raises(RequestError, match="0 <= row_begin < row_end <= 4, got 3 to 5"):
        ops.matmul("Q8_0", data, 4, x, 3, 5)
    with pytest.raises(RequestError, match="multiple of 32 columns, got 4 x 31"):
        ops.matmul("Q8_0", data, 4, x[:, :31])
    with pytest.raises(RequestError, match=r"out: expected shape \(2, 4\), got \(2, 5\)"):
        ops.matmul("Q8_0", data, 4, x, out=np.zeros((2, 5), dtype=np.float32))
