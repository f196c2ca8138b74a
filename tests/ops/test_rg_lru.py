"""The real-gated linear recurrence."""

from __future__ import annotations

import math

import numpy as np
import pytest

from gemma2_fast import _core
from gemma2_fast.errors import RequestError
from tests.ops import plain
from tests.support.closeness import assert_close, assert_rejected

OPEN = 1e9  # the sigmoid of it is 1


def f32(*rows: object) -> plain.Floats:
    return np.array(rows, np.float32)


def drawn(num_tokens: int, channels: int) -> list[plain.Floats]:
    """x, both gates, log decay and state; a open gate leaves 0.9 to 0.999 of the state, eight times over."""
    rng = np.random.default_rng(channels + num_tokens)
    rows = [rng.standard_normal((num_tokens, channels), np.float32) for _ in range(3)]
    log_decay = (8 * np.log(rng.uniform(0.9, 0.999, channels))).astype(np.float32)
    return [*rows, log_decay, rng.standard_normal(channels, np.float32)]


def test_by_hand(recurrent_ops: _core.RecurrentOps) -> None:
    """Open gates and a decay of 0.6: h = 0.6 h + 0.8 x; the first row of a sequence is what came in."""
    x, gate = f32([5], [10], [1]), f32([OPEN], [OPEN], [OPEN])
    out, last = recurrent_ops.rg_lru(x, gate, gate, f32(math.log(0.6)), f32(99), True)
    np.testing.assert_allclose(out, f32([5], [11], [7.4]), rtol=1e-6)
    np.testing.assert_array_equal(last, out[-1])
    out, _ = recurrent_ops.rg_lru(x[:1], gate[:1], gate[:1], f32(math.log(0.6)), f32(10), False)
    np.testing.assert_allclose(out, f32([10]), rtol=1e-6)


def test_closed_gates(recurrent_ops: _core.RecurrentOps) -> None:
    """A closed recurrence gate keeps every bit of the state and adds nothing."""
    state = np.random.default_rng(0).standard_normal(19, np.float32)
    rows, closed = np.ones((4, 19), np.float32), np.full((4, 19), -OPEN, np.float32)
    out, last = recurrent_ops.rg_lru(rows, rows, closed, np.full(19, -0.5, np.float32), state, False)
    np.testing.assert_array_equal(last, state)
    np.testing.assert_array_equal(out, np.tile(state, (4, 1)))


def test_a_new_sequence_reads_no_state(recurrent_ops: _core.RecurrentOps) -> None:
    *rows, state = drawn(6, 21)
    expected, _ = recurrent_ops.rg_lru(*rows, state, True)
    out, last = recurrent_ops.rg_lru(*rows, np.full_like(state, np.nan), True)
    np.testing.assert_array_equal(out, expected)
    assert np.isfinite(last).all()


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 2, 50, 700])
@pytest.mark.parametrize("channels", [1, 7, 16, 17, 64, 100])
def test_shapes(recurrent_ops: _core.RecurrentOps, channels: int, num_tokens: int, starts: bool) -> None:
    inputs = drawn(num_tokens, channels)
    exact, usual = plain.exact_and_plain(plain.rg_lru, *inputs, starts=starts)
    out, last = recurrent_ops.rg_lru(*inputs, starts)
    assert_close("rg_lru", out, exact, usual)
    np.testing.assert_array_equal(last, out[-1])


def test_a_state_that_hardly_decays(recurrent_ops: _core.RecurrentOps) -> None:
    """1 - a^2 = 2e-6, which loses half of its digits where a^2 is rounded first."""
    inputs = drawn(50, 40)
    inputs[3][:] = -1e-6
    inputs[4][:] = 0
    exact, usual = plain.exact_and_plain(plain.rg_lru, *inputs, starts=False)
    out, _ = recurrent_ops.rg_lru(*inputs, False)
    assert_close("rg_lru", out, exact, usual)
    assert np.abs(out - exact).max() < 0.1 * np.abs(usual - exact).max()


def test_errors_over_the_whole_range(recurrent_ops: _core.RecurrentOps) -> None:
    """The bounds that cpu/vector_math.h states, for the gates' sigmoid and for 1 - a^2."""
    gate = np.linspace(-87, 40, 200_001, dtype=np.float32)[None]
    one, zero = np.ones_like(gate), np.zeros_like(gate[0])
    sigmoid, _ = recurrent_ops.rg_lru(one, gate, one, zero, zero, True)
    exact = 1 / (1 + np.exp(-gate.astype(np.float64)))
    assert np.abs(sigmoid / exact - 1).max() < 2e-7

    log_decay = -np.geomspace(1e-30, 40, 200_001).astype(np.float32)
    damping, _ = recurrent_ops.rg_lru(one, OPEN * one, OPEN * one, log_decay, zero, False)
    exact = np.sqrt(-np.expm1(2 * log_decay.astype(np.float64)))
    assert np.abs(damping / exact - 1).max() < 1.6e-7  # half of 2e-7, and the roundings of the root


def test_in_pieces_bit_for_bit(recurrent_ops: _core.RecurrentOps) -> None:
    x, input_gate, recurrence_gate, log_decay, state = drawn(40, 37)
    whole, last = recurrent_ops.rg_lru(x, input_gate, recurrence_gate, log_decay, state, True)
    begin, parts = 0, []
    for end in (1, 2, 17, 40):
        rows = [part[begin:end] for part in (x, input_gate, recurrence_gate)]
        out, state = recurrent_ops.rg_lru(*rows, log_decay, state, begin == 0)
        parts.append(out)
        begin = end
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(state, last)


def test_mutants_are_rejected(recurrent_ops: _core.RecurrentOps) -> None:
    inputs = drawn(60, 33)
    x, input_gate, recurrence_gate, log_decay, state = inputs
    exact, usual = plain.exact_and_plain(plain.rg_lru, *inputs, starts=True)
    assert_close("rg_lru", recurrent_ops.rg_lru(*inputs, True)[0], exact, usual)
    for mutant in (
        plain.rg_lru(*inputs, starts=False),
        plain.rg_lru(*inputs, starts=True, damped=False),
        plain.rg_lru(*inputs, starts=True, bfloat16_state=True),
        plain.rg_lru(x, recurrence_gate, input_gate, log_decay, state, starts=True),
        plain.rg_lru(x, input_gate, recurrence_gate, log_decay / 8, state, starts=True),
    ):
        assert_rejected("rg_lru", mutant, exact, usual)


def test_nan_stays_in_its_channel(recurrent_ops: _core.RecurrentOps) -> None:
    for index in range(3):
        inputs = drawn(5, 20)
        inputs[index][2, 7] = np.nan
        out, _ = recurrent_ops.rg_lru(*inputs, True)
        assert np.isnan(out[2:, 7]).all()
        out[2:, 7] = 0
        assert np.isfinite(out).all()


def test_shapes_that_do_not_fit(recurrent_ops: _core.RecurrentOps) -> None:
    x, input_gate, recurrence_gate, log_decay, state = drawn(5, 8)
    with pytest.raises(RequestError, match="recurrence_gate"):
        recurrent_ops.rg_lru(x, input_gate, recurrence_gate[1:], log_decay, state, True)
    with pytest.raises(RequestError, match="state"):
        recurrent_ops.rg_lru(x, input_gate, recurrence_gate, log_decay, state[1:], True)
