"""int8_matmul of every quantised format: exact integer sums, the same bits for any number of tokens and on all sets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.errors import RequestError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.tensor import Tensor
from tests.ops.stored_weights import (
    HALF_OFFSETS,
    PLAIN_FORMATS,
    STRIP_FORMATS,
    Array32,
    Array64,
    activations,
    stored_matrix,
    unpacked,
)
from tests.support.closeness import assert_close, assert_rejected

QUANTISED = [name for name in FORMATS if name not in PLAIN_FORMATS]
# A strip has 64 rows; a register tile 1 to 6 tokens, matrix units 5 to 16 at once or 16 or 32 of more; a block 48 or
# 64; a pass 512.
ROWS = [1, 64, 67, 130]
TOKENS = [*range(1, 20), 31, 32, 33, 40, 41, 48, 49, 63, 64, 65, 70, 97, 129]
PART_COLS = {"INT8_G128": 128, "INT4_G32": 128, "Q6_K": 16}  # columns that share a weight scale, where not 32


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    strips: NDArray[np.uint8]
    weights: Array64
    x: Array32

    def run(self, ops: _core.Ops, begin: int = 0, end: int | None = None) -> Array32:
        return ops.int8_matmul(self.name, self.strips, self.rows, self.x[begin:end])

    def rounded_x(self) -> Array64:
        """What x is quantised to; tests/ops/test_quantize_rows.py judges that."""
        scales, integers, _ = _core.Ops("scalar").quantize_rows(self.x)
        whole: Array64 = (integers * scales[..., None].astype(np.float64)).swapaxes(0, 1).reshape(len(self.x), -1)
        return whole[:, : self.x.shape[1]]

    def exact(self, weights: Array64 | None = None) -> Array64:
        return self.rounded_x() @ (self.weights if weights is None else weights).T

    def plain(self) -> Array32:
        """Exact sums over the columns that share a scale, added in float32."""
        x, step = self.rounded_x(), PART_COLS.get(self.name, 32)
        total = np.zeros((len(x), self.rows), dtype=np.float32)
        for k in range(0, x.shape[1], step):
            total += (x[:, k : k + step] @ self.weights[:, k : k + step].T).astype(np.float32)
        return total


def make_case(name: str, rows: int, cols: int, num_tokens: int, seed: int = 0) -> Case:
    stored = FORMATS[name]
    if stored.block_rows == 1:
        tensor = Tensor((rows, cols), stored, np.ascontiguousarray(stored_matrix(name, rows, cols, seed)))
    else:
        values = np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)
        tensor = Tensor.from_float32(values, stored)
    strips = _core.Ops.pack_strips(name, tensor.data, rows, cols)
    x = activations(num_tokens, cols, seed + 1)
    x[::2, 3 % cols] *= 50  # what takes more than eight bits, in one part of a group or in two
    x[::3, 30 % cols] *= -80
    x[1::4, 70 % cols] *= 60
    x[1::4, 100 % cols] *= 70
    return Case(name, rows, strips, tensor.to_float32().astype(np.float64), x)


def columns_of(name: str) -> list[int]:
    """One block; some groups of activations and a part of one; more groups than a pass unpacks at once."""
    block = FORMATS[name].block_weights
    return [40, 330, 2300] if name not in HALF_OFFSETS else [block, 3 * block, 2048 + block]


@pytest.mark.parametrize("name", [name for name in QUANTISED if FORMATS[name].pack is not None])
def test_by_hand(ops: _core.Ops, name: str) -> None:
    """A row of halves times ones, and a row of zeros: sums that every format holds exactly."""
    cols = FORMATS[name].block_weights
    values = np.zeros((3, cols), dtype=np.float32)
    values[1] = 0.5
    tensor = Tensor.from_float32(values, FORMATS[name])
    strips = _core.Ops.pack_strips(name, tensor.data, 3, cols)
    out = ops.int8_matmul(name, strips, 3, np.full((2, cols), [[1], [-4]], dtype=np.float32))
    stored = float(tensor.to_float32()[1, 0])
    np.testing.assert_allclose(out, [[0, cols * stored, 0], [0, -4 * cols * stored, 0]], rtol=1e-6)
    assert abs(stored - 0.5) < 0.01


@pytest.mark.parametrize("name", STRIP_FORMATS)
def test_every_code_in_its_place(ops: _core.Ops, name: str) -> None:
    """A token of one column and zeros gives that column, whatever bytes are stored."""
    cols = 256
    data = np.ascontiguousarray(stored_matrix(name, 64, cols, seed=8))
    out = ops.int8_matmul(name, data, 64, np.eye(cols, dtype=np.float32))
    np.testing.assert_allclose(out, unpacked(name, data, 64, cols).T, rtol=1e-6)


@pytest.mark.parametrize("name", QUANTISED)
def test_exact(ops: _core.Ops, name: str) -> None:
    for cols in columns_of(name):
        for rows in ROWS:
            case = make_case(name, rows, cols, 9, seed=rows)
            assert_close("int8_matmul", case.run(ops), case.exact(), case.plain())


@pytest.mark.parametrize("name", QUANTISED)
def test_same_bits_for_any_number_of_tokens(ops: _core.Ops, name: str) -> None:
    for cols in columns_of(name):
        case = make_case(name, 67, cols, max(TOKENS))
        alone = np.concatenate([case.run(ops, t, t + 1) for t in range(max(TOKENS))])
        for count in TOKENS:
            np.testing.assert_array_equal(case.run(ops, 0, count), alone[:count], err_msg=f"{count} tokens")


def test_more_tokens_than_a_pass(ops: _core.Ops) -> None:
    case = make_case("INT8_G128", 65, 256, 530)
    whole = case.run(ops)
    np.testing.assert_array_equal(whole[500:], case.run(ops, 500))
    np.testing.assert_array_equal(whole[:3], case.run(ops, 0, 3))


@pytest.mark.parametrize("name", QUANTISED)
def test_same_bits_on_all_vector_sets(name: str) -> None:
    """The scalar set has no fused multiply-add; the others round alike, so their results are equal."""
    case = make_case(name, 67, columns_of(name)[1], 21)
    results = {s: case.run(_core.Ops(s)) for s in _core.instruction_sets() if s != "scalar"}
    for result in results.values():
        np.testing.assert_array_equal(result, next(iter(results.values())))


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_same_bits_however_many_strips_at_once(ops: _core.Ops, name: str, num_tokens: int) -> None:
    case = make_case(name, 64 * 7 + 3, columns_of(name)[1], num_tokens)
    alone = ops.int8_matmul(name, case.strips, case.rows, case.x, strips_at_once=1)
    for count in (2, 3, 4):
        together = ops.int8_matmul(name, case.strips, case.rows, case.x, strips_at_once=count)
        np.testing.assert_array_equal(together, alone, err_msg=f"{count} strips")


@pytest.mark.parametrize("name", QUANTISED)
def test_threads_share_strips(name: str) -> None:
    case = make_case(name, 200, columns_of(name)[1], 3)
    np.testing.assert_array_equal(case.run(_core.Ops(num_threads=2)), case.run(_core.Ops(num_threads=1)))


def test_only_the_wanted_strips_are_written(ops: _core.Ops) -> None:
    case = make_case("INT4_G32", 200, 128, 2)
    out = ops.int8_matmul(case.name, case.strips, case.rows, case.x, 1, 3)
    assert np.isnan(out[:, :64]).all()
    assert np.isnan(out[:, 192:]).all()
    np.testing.assert_array_equal(out[:, 64:192], case.run(ops)[:, 64:192])


@pytest.mark.parametrize("name", QUANTISED)
def test_not_a_number_stays_in_its_token(ops: _core.Ops, name: str) -> None:
    case = make_case(name, 67, columns_of(name)[1], 20)
    case.x[4, 5] = np.nan
    out = case.run(ops)
    assert np.isnan(out[4]).all()
    assert np.isfinite(np.delete(out, 4, axis=0)).all()


@pytest.mark.parametrize("name", QUANTISED)
def test_tolerance_rejects_mutants(name: str) -> None:
    case = make_case(name, 64, columns_of(name)[1], 9)
    exact, plain, step = case.exact(), case.plain(), PART_COLS.get(name, 32)
    swapped = case.weights.reshape(2, 2, 16, -1)[:, ::-1].reshape(case.weights.shape)  # the two nibbles of a byte
    shifted = np.roll(case.weights, 4, axis=1)  # a step of four columns late
    other_scale = case.weights.copy()
    other_scale[:, :step] *= (
        np.abs(case.weights[:, step : 2 * step]).max() / np.abs(case.weights[:, :step]).max() * 1.01
    )
    off_by_one = case.weights + np.abs(case.weights).max(axis=1, keepdims=True) / 128  # the code of zero
    for mutant in (swapped, shifted, other_scale, off_by_one):
        assert_rejected("int8_matmul", case.exact(mutant), exact, plain)
    scales, integers, _ = _core.Ops("scalar").quantize_rows(case.x)
    lower = (integers + 64 & 127) - 64  # the upper digits of the outliers forgotten
    without = (np.where(np.abs(integers) > 127, lower, integers) * scales[..., None].astype(np.float64)).swapaxes(0, 1)
    forgotten = without.reshape(len(case.x), -1)[:, : case.x.shape[1]] @ case.weights.T
    assert_rejected("int8_matmul", forgotten, exact, plain)


def test_bad_input(ops: _core.Ops) -> None:
    case = make_case("INT8_G128", 64, 128, 1)
    with pytest.raises(RequestError, match=r"strips: expected 8320 bytes, got 8319"):
        ops.int8_matmul("INT8_G128", case.strips[:-1], 64, case.x)
    with pytest.raises(RequestError, match="format: expected a quantised format, got BF16"):
        ops.int8_matmul("BF16", case.strips, 64, case.x)
    with pytest.raises(RequestError, match="weight shape"):
        ops.int8_matmul("Q8_0", case.strips, 64, case.x[:, :33].copy())
    with pytest.raises(RequestError, match="strips_at_once: expected 1 to 4, got 5"):
        ops.int8_matmul("INT8_G128", case.strips, 64, case.x, strips_at_once=5)
    with pytest.raises(RequestError, match="first_strip"):
        ops.int8_matmul("INT8_G128", case.strips, 64, case.x, 1)
