"""The choice of tokens, in Triton's interpreter, beside the sampler of the decode loop and the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from gemma2_fast import _core
from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.reference import sample as reference
from gemma2_fast.triton_kernels import sample as kernel
from gemma2_fast.triton_kernels.row_math import weights_of
from tests.ops.plain import Floats
from tests.runtime.fake_step import collect, ids_of

HOST = -1
VOCAB, BLOCK, KEEP = 1003, 256, 16  # the last block is shorter
ALL = 2**31 - 1

# Capped values far apart, or all of them ruled out, leave infinities that the steps expect.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")


@dataclass(frozen=True)
class Rule:
    """Every member but the temperature has the value that changes nothing."""

    temperature: float = 1.0
    top_k: int = ALL
    top_p: float = 1.0
    min_p: float = 0.0


def sample(
    rows: Floats, rules: Sequence[Rule], *, seed: int = 0, cap: float | None = None, keep: int = KEEP,
    block: int = BLOCK, device: str = "cpu",
) -> list[int]:  # fmt: skip
    """Of each row by each rule, [rules * rows]; row i is that of token i of its sequence. Scratch would lead astray."""
    count, (num_rows, vocab) = len(rules) * len(rows), rows.shape
    blocks = -(-vocab // block)
    given = {
        name: torch.tensor(
            [getattr(rule, name) for rule in rules for _ in rows],
            dtype=torch.int32 if name == "top_k" else torch.float32,
        )
        for name in asdict(rules[0])
    }
    given["seed"] = torch.from_numpy(np.full(count, seed, np.uint64).view(np.int64))
    given["token_index"] = torch.arange(num_rows, dtype=torch.int32).repeat(len(rules))
    firsts, best = torch.full((count, blocks), 2**62), torch.full((count, blocks, keep), 2**62)
    sums = torch.full((count, blocks), torch.nan, dtype=torch.float64)
    out = torch.full((count,), 10**6, dtype=torch.int32)
    logits = torch.from_numpy(np.tile(rows, (len(rules), 1)))
    given = {name: values.to(device) for name, values in given.items()}
    logits, firsts, best, sums, out = (values.to(device) for values in (logits, firsts, best, sums, out))
    kernel.sample(logits, given, firsts, best, sums, out, softcap=cap, block=block)
    return [int(token) for token in out]


def chosen_by_host(rows: Floats, rule: Rule, seed: int, cap: float | None) -> list[int]:
    """By the decode loop, a sequence whose token i is chosen from row i."""

    def run(batch: StepBatch) -> Floats:
        return rows[batch.positions[batch.logits_token]]

    limits = _core.Limits(
        max_running_sequences=1, max_step_tokens=8, max_seq_len=len(rows) + 1, max_logits_rows=8,
        vocab_size=rows.shape[1], final_softcap=cap,
    )  # fmt: skip
    loop = _core.DecodeLoop(_core.CallbackStep(run), _core.CachePlan(page_tokens=8, paged=[]), limits)
    rules = {name: value for name, value in asdict(rule).items() if value != getattr(Rule(temperature=-1), name)}
    params = _core.SamplingParams(max_tokens=len(rows), seed=seed, **rules)
    try:
        return ids_of(collect(loop, loop.submit(_core.Request(token_ids=[0], sampling=params))))
    finally:
        loop.close()


def chosen_by_reference(row: Floats, rule: Rule, seed: int, index: int, cap: float | None) -> int | None:
    uniform = reference.uniform_draw(seed, index)
    return reference.sample(torch.from_numpy(row), **asdict(rule), uniform=uniform, softcap=cap)


def most_in_a_block(row: Floats, rule: Rule, cap: float | None, block: int = BLOCK) -> int:
    """Of the tokens that a choice needs. With top_k these are the first k, of whose weight top_p is a share."""
    if rule.temperature == 0 or rule == Rule(temperature=rule.temperature):
        return 0
    if rule.top_k != ALL:
        rule = replace(rule, top_p=1.0, min_p=0.0)
    ids, _ = reference.candidates(torch.from_numpy(row), **asdict(rule), softcap=cap)
    return int(np.bincount(ids.numpy() // block).max())


def table(scale: float, rows: int = 2, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, VOCAB), np.float32) * np.float32(scale)


def test_by_hand() -> None:
    """The first two draws of seed 0 are 0.652 and 0.701: of four equally likely tokens numbers 2 and 2."""
    assert [reference.uniform_draw(0, i) for i in range(2)] == pytest.approx([0.652448, 0.701212], abs=1e-6)
    rows = np.full((2, VOCAB), -np.inf, np.float32)
    rows[:, [10, 200, 300, 1002]] = 3
    assert sample(rows, [Rule()]) == [300, 300]
    assert sample(rows, [Rule(top_k=3)]) == [200, 300]  # of 10, 200 and 300 a third each
    assert sample(rows, [Rule(top_p=0.5)]) == [200, 200]  # of 10 and 200
    assert sample(rows, [Rule(temperature=0)]) == [10, 10]


RULES = (
    Rule(temperature=0),
    Rule(),
    Rule(temperature=0.3),
    Rule(temperature=4.0),
    Rule(top_k=1),
    Rule(top_k=3),
    Rule(temperature=2.0, top_k=24),
    Rule(top_p=0.0),
    Rule(top_p=0.5),
    Rule(temperature=0.7, top_p=0.95),
    Rule(temperature=1.5, top_k=30, top_p=0.8),
    Rule(min_p=0.1),
    Rule(min_p=1.0),
    Rule(temperature=2.0, top_k=20, top_p=0.9, min_p=0.02),
    Rule(temperature=0.8, top_p=0.9, min_p=0.02),
    Rule(temperature=1e-40),
)


@pytest.mark.parametrize("cap", [None, 30.0, 2.5])
@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
def test_choices_are_the_hosts(scale: float, cap: float | None) -> None:
    """Rows nearly flat, like a model's, and nearly certain, by rules of all kinds in one batch. What is left to the
    host is what more tokens of a block count for than are kept."""
    rows, seed = table(scale), 2**64 - 1
    if cap is not None:  # far beyond the cap, values become equal in float32
        rows *= np.float32(min(1, 4 * cap / np.abs(rows).max()))
    ours = iter(sample(rows, RULES, seed=seed, cap=cap))
    for rule in RULES:
        for index, token in enumerate(chosen_by_host(rows, rule, seed, cap)):
            assert token == chosen_by_reference(rows[index], rule, seed, index, cap)
            most, chosen = most_in_a_block(rows[index], rule, cap), next(ours)
            assert chosen in (token, HOST), (rule, index)
            if most != KEEP:
                assert (chosen == HOST) == (most > KEEP), (rule, index, most)


def test_equals_go_by_id() -> None:
    """Minus zero is zero, and logits that the cap makes equal keep their order."""
    rows = np.full((1, VOCAB), -1, np.float32)
    rows[0, [70, 700, 7, 1000]] = [-0.0, 0.0, 0.0, -0.0]
    assert sample(rows, [Rule(temperature=0)]) == [7]
    assert {sample(rows, [Rule(top_k=2)], seed=seed)[0] for seed in range(8)} == {7, 70}
    rows[0, [7, 70, 700]] = [600, 800, 700]
    assert sample(rows, [Rule(temperature=0)], cap=30.0) == [70]
    assert {sample(rows, [Rule(top_k=2)], seed=seed, cap=30.0)[0] for seed in range(8)} == {70, 700}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 500, VOCAB - 1])
def test_bad_rows_are_left_to_the_host(bad: float, place: int) -> None:
    rows = table(3.0, rows=1)
    rows[0, place] = bad
    assert sample(rows, [Rule(temperature=0), Rule(), Rule(top_k=3)]) == [HOST] * 3


def test_rows_without_tokens_are_left_to_the_host() -> None:
    rows = np.full((1, VOCAB), -np.inf, np.float32)
    assert sample(rows, [Rule(temperature=0), Rule(), Rule(top_k=3)], cap=30.0) == [HOST] * 3


def test_tokens_that_are_ruled_out_stay_so() -> None:
    rows = np.full((1, VOCAB), -np.inf, np.float32)
    rows[0, [3, 600]] = 0
    rules = [Rule(temperature=100.0), Rule(temperature=100.0, top_p=0.9999), Rule(temperature=1e3, min_p=1e-9)]
    assert {token for seed in range(6) for token in sample(rows, rules, seed=seed, cap=5.0)} == {3, 600}


@pytest.mark.parametrize("keep", [1, 2, 4])
def test_few_kept_tokens_are_enough_or_said_not_to_be(keep: int) -> None:
    """Three tokens of a block count, so that two kept ones are too few."""
    rows = np.full((1, VOCAB), -9, np.float32)
    rows[0, [300, 310, 320, 900]] = [4, 5, 6, 5.5]
    ours = sample(rows, [Rule(top_k=4), Rule(top_p=0.99), Rule(min_p=0.1), Rule(top_k=VOCAB)], keep=keep)
    enough = [chosen_by_reference(rows[0], rule, 0, 0, None) for rule in (Rule(top_k=4), Rule(top_p=0.99))]
    assert ours[:2] == (enough if keep == 4 else [HOST, HOST])
    assert ours[3] == chosen_by_reference(rows[0], Rule(), 0, 0, None)


@triton.jit
def _weigh_kernel(logits, out, largest, temperature, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    weights = weights_of(tl.load(logits + place), largest, temperature, cap, CAPPED)
    tl.store(out + place, weights)


@pytest.mark.parametrize("cap", [None, 30.0])
def test_weights(cap: float | None) -> None:
    """A capped value is within 4e-7 of the cap, so a weight within 1.2e-5 of itself."""
    logits = np.linspace(-40, 0, 1024, dtype=np.float32)
    out = torch.empty(1024)
    _weigh_kernel[(1,)](torch.from_numpy(logits), out, 0.0, 1.0, cap or 1.0, CAPPED=cap is not None, BLOCK=1024)
    values = logits.astype(np.float64)
    exact = np.exp(values if cap is None else cap * np.tanh(values / cap))
    np.testing.assert_allclose(out.numpy(), exact, rtol=2e-7 if cap is None else 1.5e-5)
