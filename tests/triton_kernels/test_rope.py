"""Rotation with norms and cache writes, in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels.rope import rope
from tests.ops import plain
from tests.ops.plain import Floats
from tests.support.closeness import assert_close, assert_rejected

EPSILON = 1e-6
PAGE = 16
TABLE = np.array([[3, 0], [5, 1]], np.int32)  # of two sequences, rings of two pages
POSITIONS = np.array([0, 1, 15, 16, 40, 7], np.int32)
SEQUENCES = np.array([0, 0, 0, 0, 0, 1], np.int32)


@dataclass(frozen=True)
class Case:
    qkv: Floats  # [T, H + 2 K, D]
    query_heads: int
    kv_heads: int
    cos: Floats
    sin: Floats
    gains: tuple[Floats, Floats] | None

    @classmethod
    def make(cls, query_heads: int, kv_heads: int, head_dim: int, pairs: int, normed: bool) -> Case:
        rng = np.random.default_rng(head_dim + pairs)
        qkv = rng.standard_normal((len(POSITIONS), query_heads + 2 * kv_heads, head_dim), np.float32)
        angles = np.arange(POSITIONS.max() + 1)[:, None] * 100.0 ** (-np.arange(pairs) / pairs)
        gains = (0.3 * rng.standard_normal((2, head_dim), np.float32)) if normed else None
        return cls(
            qkv, query_heads, kv_heads, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32),
            None if gains is None else (gains[0], gains[1]),
        )  # fmt: skip

    def run(self) -> tuple[Floats, Floats]:
        """Queries [T, H, D], and pages [N, 2, K, P, D], NaN where nothing was written."""
        qkv = torch.from_numpy(self.qkv.copy())
        pages = torch.full((6, 2, self.kv_heads, PAGE, qkv.shape[2]), torch.nan)
        gains = {}
        if self.gains is not None:
            gains = {"query_gain": torch.from_numpy(self.gains[0]), "key_gain": torch.from_numpy(self.gains[1])}
        rope(
            qkv, torch.from_numpy(POSITIONS), torch.from_numpy(SEQUENCES), torch.from_numpy(self.cos),
            torch.from_numpy(self.sin), pages, torch.from_numpy(TABLE), epsilon=EPSILON, **gains,
        )  # fmt: skip
        return qkv.numpy()[:, : self.query_heads], pages.numpy()

    def reference(self, dtype: type) -> Floats:
        """Queries, turned keys and values: [T, H + 2 K, D]."""
        out = self.qkv.astype(dtype)
        keys_end = self.query_heads + self.kv_heads
        if self.gains is not None:
            for heads, gain in zip(
                (slice(self.query_heads), slice(self.query_heads, keys_end)), self.gains, strict=True
            ):
                out[:, heads] = plain.rms_norm(out[:, heads], 1 + gain.astype(dtype), epsilon=EPSILON)
        cos, sin = self.cos[POSITIONS].astype(dtype)[:, None], self.sin[POSITIONS].astype(dtype)[:, None]
        pairs = cos.shape[-1]
        a, b = out[:, :keys_end, :pairs].copy(), out[:, :keys_end, pairs : 2 * pairs].copy()
        out[:, :keys_end, :pairs] = a * cos - b * sin
        out[:, :keys_end, pairs : 2 * pairs] = b * cos + a * sin
        return out


def place(token: int) -> tuple[int, int]:
    page, slot = divmod(int(POSITIONS[token]), PAGE)
    return int(TABLE[SEQUENCES[token], page % TABLE.shape[1]]), slot


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim", "pairs"), [(1, 1, 16, 8), (4, 2, 32, 16), (10, 1, 32, 8), (2, 2, 128, 64)]
)
def test_queries_keys_and_values(query_heads: int, kv_heads: int, head_dim: int, pairs: int, normed: bool) -> None:
    case = Case.make(query_heads, kv_heads, head_dim, pairs, normed)
    exact, usual = case.reference(np.float64), case.reference(np.float32)
    queries, pages = case.run()
    op = "rms_norm" if normed else "rope"
    assert_close(op, queries, exact[:, :query_heads], usual[:, :query_heads])
    for token in range(len(POSITIONS)):
        block, slot = place(token)
        written = np.concatenate([pages[block, 0, :, slot], pages[block, 1, :, slot]])
        assert_close(op, written, exact[token, query_heads:], usual[token, query_heads:])
        np.testing.assert_array_equal(written[kv_heads:], case.qkv[token, query_heads + kv_heads :])
    slots = {place(token) for token in range(len(POSITIONS))}
    untouched = [(n, p) for n in range(6) for p in range(PAGE) if (n, p) not in slots]
    assert all(np.isnan(pages[n, :, :, p]).all() for n, p in untouched)


def test_position_zero_turns_nothing() -> None:
    case = Case.make(2, 1, 16, 8, normed=False)
    np.testing.assert_array_equal(case.run()[0][0], case.qkv[0, :2])


def test_neighbours_are_no_pairs() -> None:
    case = Case.make(2, 1, 16, 8, normed=False)
    exact, usual = case.reference(np.float64)[:, :2], case.reference(np.float32)[:, :2]
    a, b = case.qkv[:, :2, 0::2], case.qkv[:, :2, 1::2]
    cos, sin = case.cos[POSITIONS][:, None], case.sin[POSITIONS][:, None]
    mutant = np.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(exact.shape)
    assert_rejected("rope", mutant, exact, usual)
