"""Every kernel but attention at the sizes of the models, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast.bench.gpu.cases import unpacked
from gemma2_fast.triton_kernels import embed, geglu, matmul, matmul_tiled, rms_norm, rope
from gemma2_fast.triton_kernels.weight_formats import BF16, GROUP_COLS, INT4, INT8
from tests.gpu import plain
from tests.gpu.conftest import Judge
from tests.gpu.paged import Heads
from tests.gpu.places import CARD, GPU_WANTED, INTERPRETER, Place, cases
from tests.gpu.plain import exact_and_plain
from tests.triton_kernels import test_sample as samples

# gelu(x) of a large negative x divides by infinity, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

EPSILON = 1e-6
WIDTHS = {"Gemma 3 270M": 640, "Gemma 1 2B": 2048, "Gemma 2 2B": 2304, "Gemma 2 9B": 3584, "Gemma 2 27B": 4608}
MLP_WIDTHS = {"Gemma 1 2B": 16384, "Gemma 2 2B": 9216, "Gemma 2 9B": 14336, "Gemma 2 27B": 36864}
TOKENS = 37  # of a step; of the products of few tokens FEW_TOKENS, of many MANY_TOKENS
FEW_TOKENS = (1, 2, 7, 16)
MANY_TOKENS = (17, 128, 300)


@pytest.mark.parametrize(("place", "width"), cases(WIDTHS, {"narrow": 130}))
def test_rms_norm(judge: Judge, place: Place, width: int) -> None:
    x = place.draw(TOKENS, width, scale=3, dtype=torch.float32)
    weight, out = place.draw(width, scale=0.3, dtype=torch.float32), place.nothing(TOKENS, width)
    rms_norm.rms_norm(x, weight, EPSILON, out)
    exact, usual = exact_and_plain(plain.rms_norm, x, weight, dtype=place.dtype)
    judge.close(out, exact, usual)
    judge.rejects(plain.rms_norm(x, weight - 1), exact, usual)


@pytest.mark.parametrize("has_after", [False, True])
@pytest.mark.parametrize(("place", "width"), cases(WIDTHS, {"narrow": 130}))
def test_rms_norm_add(judge: Judge, place: Place, width: int, has_after: bool) -> None:
    branch, residual = place.draw(TOKENS, width, scale=3), place.draw(TOKENS, width, scale=2, dtype=torch.float32)
    after, before = place.draw(2, width, scale=0.3, dtype=torch.float32)

    def total(branch: torch.Tensor, residual: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return residual + (plain.rms_norm(branch, after) if has_after else branch)

    def normed(*sum_of: torch.Tensor) -> torch.Tensor:
        return plain.rms_norm(total(*sum_of[:3]), sum_of[3])

    exact_total, usual_total = exact_and_plain(total, branch, residual, after, dtype=torch.float32)
    exact, usual = exact_and_plain(normed, branch, residual, after, before, dtype=place.dtype)
    mutant = normed(branch.double(), residual.double(), before, after)
    out = place.nothing(TOKENS, width)
    rms_norm.rms_norm_add(branch, after if has_after else None, residual, before, EPSILON, out)
    judge.close(residual, exact_total, usual_total)
    judge.close(out, exact, usual)
    judge.rejects(mutant, exact, usual)


@pytest.mark.parametrize(("place", "width"), cases(MLP_WIDTHS, {"narrow": 70}))
def test_geglu(judge: Judge, place: Place, width: int) -> None:
    gate_up, out = place.draw(TOKENS, 2 * width, scale=2), place.nothing(TOKENS, width)
    geglu.geglu(gate_up, out)
    exact, usual = exact_and_plain(plain.geglu, gate_up, dtype=place.dtype)
    judge.close(out, exact, usual)
    judge.rejects(plain.geglu(gate_up.double().roll(width, -1)), exact, usual)


FORMATS = {"bfloat16": BF16.value, "int8": INT8.value, "int4": INT4.value}


@dataclass(frozen=True)
class Weights:
    """A drawn matrix of `cols` columns as kernels read it (weight_formats.py)."""

    cols: int
    weight: torch.Tensor
    scales: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @classmethod
    def draw(cls, place: Place, rows: int, cols: int, code: int) -> Weights:
        groups = -(-cols // GROUP_COLS)
        if code == BF16.value:
            return cls(cols, place.draw(rows, cols, scale=cols**-0.5))
        scales = 0.01 + place.draw(rows, groups, scale=0.002)
        if code == INT8.value:
            codes = place.draw(rows, cols, scale=40, dtype=torch.float32).round().clamp(-127, 127)
            return cls(cols, codes.to(torch.int8), scales)
        packed, factors = (
            place.draw(rows, groups, size, scale=500, dtype=torch.float32).to(torch.int32).to(torch.uint8)
            for size in (GROUP_COLS // 2, 2)
        )
        return cls(cols, packed, scales, factors)

    def values(self, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Those rows, [rows, cols] float32."""
        numbers = self.weight[rows]
        if self.factors is not None:
            numbers = unpacked(numbers, self.factors[rows])
        if self.scales is None:
            return numbers.float()
        scales = self.scales[rows].float().repeat_interleave(GROUP_COLS, 1)
        return numbers[:, : self.cols].float() * scales[:, : self.cols]

    @property
    def arrays(self) -> tuple[Any, ...]:
        """As arguments of launchers, after the result."""
        return self.scales, self.factors


@pytest.mark.parametrize("code", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("place", "size"), cases({name: (256_000, width) for name, width in WIDTHS.items()}, {"small": (50, 200)})
)
def test_embed(place: Place, size: tuple[int, int], code: int) -> None:
    """To the bit: products of two or three numbers, one after another."""
    vocab, width = size
    ids = place.ints([0, vocab - 1, 1, 7, 7, vocab // 2])
    table = Weights.draw(place, vocab, width, code)
    factor, out = float(np.float32(width**0.5)), place.nothing(len(ids), width, dtype=torch.float32)
    embed.embed(ids, table.weight, factor, out, *table.arrays)
    rows = table.values(ids)
    assert torch.equal(out, rows * factor)
    assert not torch.equal(out[2], rows[1] * factor)


def test_embed_takes_what_the_step_before_chose() -> None:
    place = CARD if GPU_WANTED else INTERPRETER
    table, chosen = place.draw(50, 200), place.ints([9, -1, 30])
    out = place.nothing(3, 200, dtype=torch.float32)
    embed.embed(place.ints([-3, 4, -1]), table, 2.0, out, chosen=chosen)
    assert torch.equal(out, table[[30, 4, 9]].float() * 2)


@dataclass(frozen=True)
class Matrix:
    """rows: of the result. gated: of gate and up. head: rows of x are named, and the result is float32."""

    rows: int
    cols: int
    gated: bool = False
    head: bool = False


MATRICES = {
    "Gemma 1 2B qkv": Matrix(2560, 2048),
    "Gemma 1 7B down": Matrix(3072, 24576),
    "Gemma 2 2B gate and up": Matrix(9216, 2304, gated=True),
    "Gemma 2 2B head": Matrix(256_000, 2304, head=True),
    "Gemma 2 9B down": Matrix(3584, 14336),
    "Gemma 2 27B gate and up": Matrix(36864, 4608, gated=True),
    "Gemma 3 270M output": Matrix(640, 1024),
    "Gemma 3 1B gate and up": Matrix(6912, 1152, gated=True),
}
SMALL_MATRICES = {
    "plain": Matrix(33, 200),
    "gate and up": Matrix(17, 130, gated=True),
    "head": Matrix(40, 130, head=True),
}


class Product:
    """A drawn matrix in a format, and what its products should be."""

    def __init__(self, place: Place, matrix: Matrix, code: int) -> None:
        self.op = plain.gated_product if matrix.gated else plain.product
        self.weights = Weights.draw(place, matrix.rows * (1 + matrix.gated), matrix.cols, code)
        self.values = self.weights.values()

    def exact_and_plain(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return exact_and_plain(self.op, x, self.values, dtype=dtype)

    def mutant(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of the next row's weights: of a gated product the edge between gate and up moves, too."""
        return self.op(x.float(), self.values.float().roll(1, 0))


@pytest.mark.parametrize("code", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(("place", "matrix"), cases(MATRICES, SMALL_MATRICES))
def test_matmul(judge: Judge, place: Place, matrix: Matrix, code: int) -> None:
    product, dtype = Product(place, matrix, code), torch.float32 if matrix.head else place.dtype
    for tokens in FEW_TOKENS:
        x = place.draw(tokens + 3, matrix.cols)
        wanted = place.ints([tokens + 2, *range(tokens - 1)]) if matrix.head else None
        taken = x[:tokens] if wanted is None else x[wanted]
        out = place.nothing(tokens, matrix.rows, dtype=dtype)
        sizes = place.sizes("matmul", tokens=1 if tokens == 1 else matmul.MOST_TOKENS, format=code)
        given = x if matrix.head else taken
        weight, arrays = product.weights.weight, product.weights.arrays
        matmul.matmul(given, weight, out, *arrays, geglu=matrix.gated, row_index=wanted, **sizes)
        exact, usual = product.exact_and_plain(taken, dtype)
        judge.close(out, exact, usual)
        judge.rejects(product.mutant(taken), exact, usual)


@pytest.mark.parametrize("code", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("place", "matrix"),
    cases(
        {
            "Gemma 2 2B qkv": Matrix(4096, 2304),
            "Gemma 2 9B gate and up": Matrix(28672, 3584),
            "Gemma 2 27B down": Matrix(4608, 36864),
            "Gemma 3 270M down": Matrix(640, 2048),
        },
        {"small": Matrix(70, 200)},
    ),
)
def test_matmul_tiled(judge: Judge, place: Place, matrix: Matrix, code: int) -> None:
    product = Product(place, matrix, code)
    for tokens in MANY_TOKENS:
        x, out = place.draw(tokens, matrix.cols), place.nothing(tokens, matrix.rows)
        sizes = place.sizes("matmul_tiled", format=code)
        matmul_tiled.matmul_tiled(x, product.weights.weight, out, *product.weights.arrays, **sizes)
        exact, usual = product.exact_and_plain(x, place.dtype)
        judge.close(out, exact, usual)
        judge.rejects(product.mutant(x), exact, usual)


ROPES = {
    "Gemma 1 2B": (Heads(8, 1, 256), False),
    "Gemma 2 2B": (Heads(8, 4, 256), False),
    "Gemma 2 27B": (Heads(32, 16, 128), False),
    "Gemma 3 1B": (Heads(4, 1, 256), True),
    "Gemma 3 27B": (Heads(32, 16, 128), True),
}


@pytest.mark.parametrize(
    ("place", "case"), cases(ROPES, {"plain": (Heads(4, 2, 16), False), "normed": (Heads(2, 1, 32), True)})
)
def test_rope(judge: Judge, place: Place, case: tuple[Heads, bool]) -> None:
    """Of two sequences, in rings of pages that lie in no order; all else of the cache is left alone."""
    heads, normed = case
    page, keys_end = place.page_tokens, heads.query_heads + heads.kv_heads
    positions = place.ints([0, 1, page - 1, page, 5 * page + 3, 2 * page - 1, 7 * page + 5])
    sequences = place.ints([0, 0, 0, 0, 0, 1, 1])
    table = place.ints([[3, 9, 1, 11, 4, 7], [2, 8, 10, 5, 6, 0]])
    qkv = place.draw(len(positions), keys_end + heads.kv_heads, heads.head_dim)
    before = qkv.clone()
    pages = place.nothing(12, 2, heads.kv_heads, page, heads.head_dim)
    pairs = heads.head_dim // 2
    angles = torch.outer(
        torch.arange(8 * page, device=place.device), 1e4 ** -(torch.arange(pairs, device=place.device) / pairs)
    )
    cos, sin, gains = angles.cos(), angles.sin(), {}
    if normed:
        query_gain, key_gain = place.draw(2, heads.head_dim, scale=0.3, dtype=torch.float32)
        gains = {"query_gain": query_gain, "key_gain": key_gain, "epsilon": EPSILON}
    rope.rope(qkv, positions, sequences, cos, sin, pages, table, **gains)

    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        queries, keys, values = x.split((heads.query_heads, heads.kv_heads, heads.kv_heads), 1)
        if normed:
            queries, keys = plain.rms_norm(queries, query_gain), plain.rms_norm(keys, key_gain)
        return torch.cat((plain.rope(queries, cos, sin), plain.rope(keys, cos, sin), values), 1)

    exact, usual = exact_and_plain(turned, before, cos[positions], sin[positions], dtype=place.dtype)
    slots = table[sequences, positions // page % table.shape[1]].long(), positions.long() % page
    written = pages[slots[0], :, :, slots[1]].flatten(1, 2)
    judge.close(torch.cat((qkv[:, : heads.query_heads], written), 1), exact, usual)
    judge.rejects(turned(before.double(), sin[positions], cos[positions]), exact, usual)
    assert torch.equal(qkv[:, heads.query_heads :], before[:, heads.query_heads :])
    pages[slots[0], :, :, slots[1]] = torch.nan
    assert pages.isnan().all()


VOCABULARIES = {
    "Gemma 2": {"vocab": 256_000, "block": 2048, "cap": 30.0, "rows": 8},
    "Gemma 3": {"vocab": 262_208, "block": 2048, "cap": None, "rows": 8},
}
SMALL_VOCABULARY = {"small": {"vocab": samples.VOCAB, "block": samples.BLOCK, "cap": 30.0, "rows": 1}}


@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
@pytest.mark.parametrize(("place", "case"), cases(VOCABULARIES, SMALL_VOCABULARY))
def test_sample(place: Place, case: dict[str, Any]) -> None:
    """The tokens of the host, or HOST where more tokens of a block count than the kernel keeps."""
    vocab, block, cap = case["vocab"], case["block"], case["cap"]
    rows = 3 * np.random.default_rng(vocab).standard_normal((case["rows"], vocab), np.float32)
    ours = iter(samples.sample(rows, samples.RULES, seed=7, cap=cap, block=block, device=place.device))
    on_device = 0
    for rule in samples.RULES:
        for index, token in enumerate(samples.chosen_by_host(rows, rule, 7, cap)):
            most, chosen = samples.most_in_a_block(rows[index], rule, cap, block), next(ours)
            assert chosen in (token, samples.HOST), (rule, index)
            assert (chosen == samples.HOST) == (most > samples.KEEP) or most == samples.KEEP, (rule, index, most)
            on_device += chosen != samples.HOST
    assert on_device >= len(samples.RULES) * len(rows) // 2
