"""Both kernels of attention, and the order in which splits of the keys are added up."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from gemma2_fast.triton_kernels.attention_decode import attention_decode, rows_for
from gemma2_fast.triton_kernels.attention_prefill import attention_prefill, prefill_tiles
from tests.gpu.conftest import Judge
from tests.gpu.paged import Heads, PagedSequences
from tests.gpu.places import Place, cases

GEMMA = {
    "Gemma 2 2B local": Heads(8, 4, 256, cap=50.0, window=4096),
    "Gemma 2 2B global": Heads(8, 4, 256, cap=50.0),
    "Gemma 2 9B local": Heads(16, 8, 256, cap=50.0, window=4096),
    "Gemma 2 27B local": Heads(32, 16, 128, cap=50.0, window=4096),
    "Gemma 2 27B global": Heads(32, 16, 128, cap=50.0),
    "Gemma 3 1B local": Heads(4, 1, 256, window=512),
    "Gemma 3 27B global": Heads(32, 16, 128),
    "Gemma 1 2B": Heads(8, 1, 256),
    "RecurrentGemma 2B": Heads(10, 1, 256, window=2049),
    "Gemma 1 7B": Heads(16, 16, 256),
    "RecurrentGemma 9B": Heads(16, 1, 256, window=2049),
}


@dataclass(frozen=True)
class Work:
    """Sequences by kind, each of tokens in the cache and new ones; splits of their keys; launches to be compared.

    Sequences begin, go on in mid-page, are past the window by more than a page, or have no token. Guesses are verified
    with the token before them: one, and seven.
    """

    prompts: tuple[tuple[int, int], ...] = ((0, 1), (0, 200), (300, 65), (4000, 150), (4090, 64), (0, 0), (7900, 33))
    contexts: tuple[int, ...] = (0, 63, 64, 511, 512, 4095, 4096, 6000, 8191)
    guesses: tuple[tuple[tuple[int, int], ...], ...] = (
        ((8000, 2), (100, 1), (0, 2), (4095, 2)),
        ((8000, 8), (100, 1), (0, 8), (4090, 8), (60, 7)),
    )
    splits: tuple[int, ...] = (1, 7, 64)
    launches: int = 200

    @property
    def decodes(self) -> tuple[tuple[int, int], ...]:
        return (*((context, 1) for context in self.contexts), (0, 0))


SMALL = Work(
    ((0, 1), (21, 16), (0, 0), (90, 3)),
    (0, 16, 123),
    (((60, 2), (0, 2)), ((60, 8), (12, 7))),
    splits=(1, 3),
    launches=2,
)
CASES = cases(
    {name: (heads, Work()) for name, heads in GEMMA.items()},
    {
        "capped local": (Heads(4, 2, 16, cap=20.0, window=40), SMALL),
        "global": (Heads(4, 1, 16), SMALL),
        "a large group": (Heads(10, 1, 16, window=40), SMALL),
    },
)
MARGIN = 4.0  # of mutants: plain attention rounds scores to bfloat16, up to an eighth of one near the cap


def prefill(place: Place, sequences: PagedSequences, first: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
    """first: of the sequences whose queries lie in tiles."""
    sizes = place.sizes("attention_prefill", head_dim=sequences.heads.head_dim)
    out = place.nothing(*sequences.queries.shape) if out is None else out
    tiled = [(context, new if s >= first else 0) for s, (context, new) in enumerate(sequences.lengths)]
    tiles = place.ints(prefill_tiles(tiled, sequences.heads.group, sizes["tile"]))
    attention_prefill(
        sequences.queries, sequences.pages, sequences.block_table, sequences.first_token, sequences.context_tokens,
        tiles, out, **sequences.rule, **sizes,
    )  # fmt: skip
    return out


class Decode:
    """Decode attention of the first `count` sequences, or all, with its scratch, which serves again."""

    def __init__(self, place: Place, sequences: PagedSequences, splits: int, count: int | None = None) -> None:
        self.place, self.sequences = place, sequences
        lengths, heads = sequences.lengths[:count], sequences.heads
        rows = rows_for(heads.group, max(new for _, new in lengths))
        self.sizes = place.sizes("attention_decode", head_dim=heads.head_dim, ROWS=rows)
        self.sizes.pop("rows", None)  # which the scratch tells
        pairs = (len(lengths), heads.kv_heads)
        self.parts = place.nothing(*pairs, splits, rows, sequences.heads.head_dim, dtype=torch.float32)
        self.part_sums = place.nothing(*pairs, splits, 2, rows, dtype=torch.float32)
        self.arrivals = torch.zeros(pairs, dtype=torch.int32, device=place.device)

    def __call__(self) -> torch.Tensor:
        self.parts.fill_(torch.nan)  # what is read too early must not be what the last launch left
        self.part_sums.fill_(torch.nan)
        of, out = self.sequences, self.place.nothing(*self.sequences.queries.shape)
        attention_decode(
            of.queries, of.pages, of.block_table, of.first_token, of.context_tokens, out, self.parts, self.part_sums,
            self.arrivals, **of.rule, **self.sizes,
        )  # fmt: skip
        return out


def assert_mutants_are_rejected(judge: Judge, sequences: PagedSequences, plain: torch.Tensor) -> None:
    exact = sequences.reference(torch.float64)
    for mutant in sequences.mutants().values():
        judge.rejects(mutant, exact, plain, MARGIN)


@pytest.mark.parametrize(("place", "case"), CASES)
def test_prefill(judge: Judge, place: Place, case: tuple[Heads, Work]) -> None:
    heads, work = case
    sequences = PagedSequences(place, heads, work.prompts)
    plain = sequences.reference(place.dtype)
    judge.close(prefill(place, sequences), sequences.reference(torch.float64), plain)
    assert_mutants_are_rejected(judge, sequences, plain)


@pytest.mark.parametrize(("place", "case"), CASES)
def test_decode(judge: Judge, place: Place, case: tuple[Heads, Work]) -> None:
    heads, work = case
    for lengths in (work.decodes, *work.guesses):
        sequences = PagedSequences(place, heads, lengths)
        exact, plain = sequences.reference(torch.float64), sequences.reference(place.dtype)
        for splits in work.splits:
            judge.close(Decode(place, sequences, splits)(), exact, plain)
        assert_mutants_are_rejected(judge, sequences, plain)


@pytest.mark.parametrize(("place", "case"), CASES)
def test_a_step_of_both(judge: Judge, place: Place, case: tuple[Heads, Work]) -> None:
    """Sequences that decode, with the bits that they have alone, and prompts behind them."""
    heads, work = case
    count = len(work.decodes)
    sequences = PagedSequences(place, heads, (*work.decodes, *work.prompts))
    out = Decode(place, sequences, work.splits[-1], count)()
    decoded = sum(new for _, new in work.decodes)
    before = out[:decoded].clone()
    assert torch.isfinite(before).all()
    assert torch.isnan(out[decoded:]).all()
    prefill(place, sequences, count, out)
    assert torch.equal(out[:decoded], before)
    judge.close(out, sequences.reference(torch.float64), sequences.reference(place.dtype))


@pytest.mark.parametrize(("place", "case"), CASES)
def test_splits_are_added_in_one_order(place: Place, case: tuple[Heads, Work]) -> None:
    """Whoever arrives last: bit for bit the same, time after time."""
    heads, work = case
    for lengths in (work.decodes, work.guesses[-1]):
        run = Decode(place, PagedSequences(place, heads, lengths), work.splits[-1])
        first = run()
        assert torch.isfinite(first).all()
        differing = sum(not torch.equal(run(), first) for _ in range(work.launches))
        assert differing == 0, f"{differing} of {work.launches} launches gave other bits"
        assert not run.arrivals.any()
