"""The reference's recurrent ops, with values a reader can check by hand, and documents that follow one another."""

from __future__ import annotations

import math

import pytest
import torch

from gemma2_fast.reference.block_diagonal import block_diagonal
from gemma2_fast.reference.conv1d import conv1d
from gemma2_fast.reference.rg_lru import rg_lru

INFINITE = 1e9  # the gates' sigmoid of it is 1
# exp(-8 softplus(decay)) = 0.6, where 1 - a^2 is 0.8^2
DECAY = math.log(math.exp(-math.log(0.6) / 8) - 1)


def f64(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestConv1d:
    WEIGHT = f64([[1000, 100, 10]])  # tap 2 meets the token itself

    def test_by_hand(self) -> None:
        x = f64([1], [2], [3], [4])
        out, tail = conv1d(x, self.WEIGHT, f64(0.5), f64([0], [0]), ints(0, 1, 2, 3))
        assert out.flatten().tolist() == [10.5, 120.5, 1230.5, 2340.5]
        assert tail.flatten().tolist() == [3, 4]

    def test_the_tail_stands_before_the_first_token(self) -> None:
        out, tail = conv1d(f64([7]), self.WEIGHT, f64(0), f64([5], [6]), ints(2))
        assert out.flatten().tolist() == [5670]
        assert tail.flatten().tolist() == [6, 7]

    def test_another_document_is_not_seen(self) -> None:
        x = f64([1], [2], [3], [4])
        out, _ = conv1d(x, self.WEIGHT, f64(0), f64([8], [9]), ints(5, 0, 1, 2))
        assert out.flatten().tolist() == [8910, 20, 230, 2340]

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            conv1d(f64([1]), self.WEIGHT, f64(0), f64([1]), ints(0))


class TestBlockDiagonal:
    def test_by_hand(self) -> None:
        """(block, in, out): the first block swaps and doubles one of its two columns, the second keeps them."""
        weight = f64([[0, 2], [1, 0]], [[1, 0], [0, 1]])
        out = block_diagonal(f64([1, 10, 100, 1000]), weight, f64([0, 0.5], [0, 0]))
        assert out.tolist() == [[10, 2.5, 100, 1000]]

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            block_diagonal(f64([1, 2, 3]), torch.zeros(2, 2, 2), torch.zeros(2, 2))


class TestRgLru:
    def test_by_hand(self) -> None:
        """Open gates: h = 0.6 h + 0.8 x, and h = x at position 0, whatever the state was."""
        x, open_gate = f64([5], [10], [1]), f64([INFINITE], [INFINITE], [INFINITE])
        out, state = rg_lru(x, open_gate, open_gate, f64(DECAY), f64(99), ints(0, 1, 2))
        torch.testing.assert_close(out, f64([5], [11], [7.4]))
        torch.testing.assert_close(state, f64(7.4))

    def test_the_state_goes_on(self) -> None:
        out, _ = rg_lru(f64([10]), f64([INFINITE]), f64([INFINITE]), f64(DECAY), f64(5), ints(1))
        torch.testing.assert_close(out, f64([11]))

    def test_gates(self) -> None:
        """A closed input gate adds nothing; a closed recurrence gate keeps the state and damps the input to nothing."""
        one = f64([INFINITE])
        out, _ = rg_lru(f64([10]), -one, one, f64(DECAY), f64(5), ints(3))
        torch.testing.assert_close(out, f64([3]))
        out, _ = rg_lru(f64([10]), one, -one, f64(DECAY), f64(5), ints(3))
        torch.testing.assert_close(out, f64([5]))

    def test_half_open_gates(self) -> None:
        """sigmoid(0) = 1/2: a is the root of 0.6, and half of the input is let in."""
        out, _ = rg_lru(f64([10]), f64([0]), f64([0]), f64(DECAY), f64(5), ints(1))
        torch.testing.assert_close(out, f64([math.sqrt(0.6) * 5 + math.sqrt(0.4) * 5]))

    def test_the_state_is_float32_in_a_bfloat16_run(self) -> None:
        """Closed gates keep 1 + 2^-20, which bfloat16 does not have; the output is rounded, the state is not."""
        closed = torch.full((3, 1), -INFINITE).bfloat16()
        state = torch.tensor([1 + 2.0**-20])
        out, last = rg_lru(closed, closed, closed, torch.ones(1).bfloat16(), state, ints(1, 2, 3))
        assert torch.equal(last, state)
        assert out.tolist() == [[1]] * 3
        assert out.dtype == torch.bfloat16

    def test_shapes_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            rg_lru(f64([1]), f64([1]), f64([1, 2]), f64(1), f64(1), ints(0))


def recurrent(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Convolution, gates and recurrence of random weights over rows x [T, 6]."""
    conv, _ = conv1d(x, drawn(1, 6, 1, 4), drawn(2, 6), drawn(3, 3, 6), positions)
    gates = [block_diagonal(conv, drawn(seed, 2, 3, 3), drawn(seed + 1, 2, 3)) for seed in (4, 6)]
    out, _ = rg_lru(conv, gates[0], gates[1], drawn(8, 6) - 4, drawn(9, 6), positions)
    return out


def test_packed_documents_are_strangers() -> None:
    """Two documents in one sequence give what each gives alone; the first may be the rest of a longer one."""
    x = drawn(0, 11, 6)
    packed = recurrent(x, ints(7, 8, 9, 10, 0, 1, 2, 3, 4, 5, 6))
    torch.testing.assert_close(packed[:4], recurrent(x[:4], ints(7, 8, 9, 10)), rtol=0, atol=0)
    torch.testing.assert_close(packed[4:], recurrent(x[4:], ints(0, 1, 2, 3, 4, 5, 6)), rtol=0, atol=0)
