"""The reference's ops, one by one, with values a reader can check by hand."""

from __future__ import annotations

import math

import pytest
import torch

from gemma2_fast.reference.attention import attention, hidden_keys
from gemma2_fast.reference.embed import embed
from gemma2_fast.reference.geglu import geglu
from gemma2_fast.reference.matmul import matmul
from gemma2_fast.reference.rms_norm import rms_norm
from gemma2_fast.reference.rope import rope, rope_tables
from gemma2_fast.reference.softcap import softcap
from gemma2_fast.spec import RopeSpec


def f64(*rows: object) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    first_query: int = 0,
    first_key: int = 0,
    cap: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    return attention(
        queries,
        keys,
        values,
        first_query=first_query,
        first_key=first_key,
        query_scale=1.0,
        score_softcap=cap,
        window_keys=window,
    )


class TestRmsNorm:
    def test_by_hand(self) -> None:
        # mean(1, 49) = 25, so the row is divided by 5; the gains are 1 + 0 and 1 + 1.
        torch.testing.assert_close(rms_norm(f64([1, 7]), f64(0, 1), 0.0), f64([0.2, 2.8]))

    def test_epsilon_stands_under_the_root(self) -> None:
        # mean(0, 8) = 4, and 4 + 5 = 9.
        torch.testing.assert_close(rms_norm(f64([0, math.sqrt(8)]), f64(0, 0), 5.0), f64([0, math.sqrt(8) / 3]))

    def test_bfloat16_rounds_once(self) -> None:
        x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
        weight = torch.linspace(-0.9, 2.0, 48).bfloat16()
        in_float32 = rms_norm(x.float(), weight.float(), 1e-6)
        assert torch.equal(rms_norm(x, weight, 1e-6), in_float32.bfloat16())

    def test_float64_stays_float64(self) -> None:
        x = f64([1.0, 1.0 + 1e-12])
        assert rms_norm(x, f64(0, 0), 0.0).diff().item() == pytest.approx(1e-12, rel=1e-3)

    def test_weight_of_another_width(self) -> None:
        with pytest.raises(ValueError, match="weight has shape"):
            rms_norm(f64([1, 7]), f64(0), 0.0)


class TestRope:
    SPEC = RopeSpec(base=10_000.0, rotated_dims=4, position_scale=1.0)

    def test_tables_by_hand(self) -> None:
        # Frequencies 1 and 10000 ** (-2 / 4) = 0.01.
        cos, sin = rope_tables(self.SPEC, torch.tensor([0, 2]), torch.float64)
        torch.testing.assert_close(cos, f64([1, 1], [math.cos(2), math.cos(0.02)]), rtol=0, atol=1e-7)
        torch.testing.assert_close(sin, f64([0, 0], [math.sin(2), math.sin(0.02)]), rtol=0, atol=1e-7)

    def test_quarter_turn_of_halves(self) -> None:
        # Pairs are (x0, x2) and (x1, x3); the last dim is not rotated. cos 0, sin 1 maps (a, b) to (-b, a).
        x = f64([[1, 2, 3, 4, 5]])
        assert rope(x, f64([0, 0]), f64([1, 1])).tolist() == [[[-3, -4, 1, 2, 5]]]

    def test_position_scale(self) -> None:
        eighth = RopeSpec(base=10_000.0, rotated_dims=4, position_scale=0.125)
        for table, far_table in zip(
            rope_tables(self.SPEC, torch.tensor([3]), torch.float64),
            rope_tables(eighth, torch.tensor([24]), torch.float64),
            strict=True,
        ):
            assert torch.equal(table, far_table)

    def test_neighbouring_far_positions_differ_in_bfloat16(self) -> None:
        """A bfloat16 angle cannot tell 8190 from 8191; a float32 one can."""
        cos, _ = rope_tables(self.SPEC, torch.tensor([8190, 8191]), torch.bfloat16)
        assert cos[0, 0] != cos[1, 0]

    def test_tables_that_do_not_fit(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            rope(f64([[1, 2]]), f64([1, 1]), f64([0, 0]))


class TestSoftcap:
    def test_by_hand(self) -> None:
        # tanh(ln 2) = (2 - 1/2) / (2 + 1/2) = 0.6
        torch.testing.assert_close(softcap(f64(0, 5 * math.log(2), -1e9), 5.0), f64(0, 3, -5))

    @pytest.mark.parametrize("cap", [0.0, -1.0, math.nan, math.inf])
    def test_impossible_cap(self, cap: float) -> None:
        with pytest.raises(ValueError, match="positive and finite"):
            softcap(f64(1), cap)


class TestGeglu:
    def test_by_hand(self) -> None:
        at_one = 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715))
        torch.testing.assert_close(geglu(f64(0, 1, 30, -30), f64(7, 2, 3, 3)), f64(0, 2 * at_one, 90, 0))

    def test_shapes_differ(self) -> None:
        with pytest.raises(ValueError, match="one shape"):
            geglu(f64(1, 2), f64(1))


class TestEmbed:
    def test_by_hand(self) -> None:
        table = f64([1, 2], [3, 4])
        assert embed(torch.tensor([1, 0, 1]), table, 10.0).tolist() == [[30, 40], [10, 20], [30, 40]]

    def test_bfloat16_rounds_the_scale_first(self) -> None:
        # sqrt(3072) = 55.4256 is 55.5 in bfloat16, and 9 * 55.5 = 499.5 becomes 500; 9 * 55.4256 = 498.8 would be 498.
        table = torch.tensor([[1.0, 9.0]], dtype=torch.bfloat16)
        assert embed(torch.tensor([0]), table, math.sqrt(3072)).tolist() == [[55.5, 500.0]]

    @pytest.mark.parametrize("token_id", [-1, 2])
    def test_id_out_of_range(self, token_id: int) -> None:
        with pytest.raises(ValueError, match=rf"0\.\.1, got {token_id}"):
            embed(torch.tensor([0, token_id]), f64([1], [2]), 1.0)


class TestMatmul:
    def test_by_hand(self) -> None:
        weight = f64([1, 2], [3, 4], [5, 6])
        assert matmul(f64([1, 10]), weight).tolist() == [[21, 43, 65]]
        assert matmul(f64([1, 10]), weight, f64(1, 2, 3)).tolist() == [[22, 45, 68]]

    def test_columns_differ(self) -> None:
        with pytest.raises(ValueError, match="columns"):
            matmul(f64([1, 2, 3]), f64([1, 2]))


class TestAttention:
    VALUES = f64([[1]], [[2]], [[4]], [[8]])
    FLAT = torch.zeros(4, 1, 1, dtype=torch.float64)

    def test_equal_scores_average_what_is_seen(self) -> None:
        out = attend(self.FLAT, self.FLAT, self.VALUES)
        torch.testing.assert_close(out.flatten(), f64(1, 3 / 2, 7 / 3, 15 / 4))

    def test_a_window_of_two_counts_the_query(self) -> None:
        out = attend(self.FLAT, self.FLAT, self.VALUES, window=2)
        torch.testing.assert_close(out.flatten(), f64(1, 3 / 2, 3, 6))

    def test_a_late_query(self) -> None:
        out = attend(self.FLAT[:1], self.FLAT[1:], self.VALUES[1:], first_query=9, first_key=7, window=2)
        torch.testing.assert_close(out.flatten(), f64(6))

    def test_softmax_of_the_scores(self) -> None:
        # Scores ln 1, ln 2 and ln 5 give shares 1/8, 2/8 and 5/8.
        keys = f64([[0.0]], [[math.log(2)]], [[math.log(5)]])
        out = attend(f64([[1]]), keys, self.VALUES[:3], first_query=2)
        torch.testing.assert_close(out.flatten(), f64((1 + 4 + 20) / 8))

    def test_the_cap_comes_before_the_mask(self) -> None:
        # Capped at ln 2 / tanh(1), a score of the cap itself becomes ln 2: shares 1/3 and 2/3, hidden keys nothing.
        cap = math.log(2) / math.tanh(1)
        keys = f64([[0.0]], [[cap]], [[100.0]])
        out = attend(f64([[1]]), keys, self.VALUES[:3], first_query=1, cap=cap)
        torch.testing.assert_close(out.flatten(), f64(5 / 3))

    def test_heads_share_kv_heads_in_order(self) -> None:
        values = f64([[1], [2]])
        out = attend(torch.zeros(1, 6, 1, dtype=torch.float64), torch.zeros(1, 2, 1, dtype=torch.float64), values)
        assert out.flatten().tolist() == [1, 1, 1, 2, 2, 2]

    def test_hidden_keys(self) -> None:
        assert hidden_keys(2, 4, 2, 2).tolist() == [[True, False, False, True], [True, True, False, False]]

    @pytest.mark.parametrize("first_query", [-1, 1])
    def test_a_query_without_its_own_key(self, first_query: int) -> None:
        with pytest.raises(ValueError, match="own keys"):
            attend(self.FLAT, self.FLAT, self.VALUES, first_query=first_query)

    def test_heads_that_do_not_divide(self) -> None:
        with pytest.raises(ValueError, match="do not fit"):
            attend(self.FLAT.expand(4, 3, 1), self.FLAT.expand(4, 2, 1), self.VALUES.expand(4, 2, 1))
