"""Batches, chunks, steps and pages change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2_fast.engine.cache_plan import PAGE_TOKENS, CachePlan, plan_cache
from gemma2_fast.engine.step_batch import NO_BLOCK, Ints, StepBatch
from gemma2_fast.errors import BackendError, RequestError, WeightsError
from gemma2_fast.reference import Cache, ContiguousCache, PagedCache, ReferenceModel, ReferenceStep, flat_batch
from gemma2_fast.reference.int8_kv import int8_kv
from gemma2_fast.reference.softcap import softcap
from tests.support.tiny_models import FAMILIES, WINDOW_KEYS, TinyModel, tiny_model

MAX_SEQ_LEN = 4 * PAGE_TOKENS
MAX_STEP_TOKENS = 40  # a sequence's ring of pages for a window of 9 keys is then 3 pages, and the rows below wrap it
LENGTHS = (1, 3 * PAGE_TOKENS + 5, WINDOW_KEYS, 2 * WINDOW_KEYS + 3)
STATE_SLOTS = (2, 0, 3, 1)  # of models with recurrent layers


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def model(tiny: TinyModel) -> ReferenceModel:
    return ReferenceModel(tiny.spec, tiny.weights, torch.float64)


def prompts() -> list[list[int]]:
    return [np.random.default_rng(length).integers(3, 512, length).tolist() for length in LENGTHS]


def plan(model: ReferenceModel, kv_dtype: str = "float64") -> CachePlan:
    return plan_cache(
        model.spec,
        kv_dtype=kv_dtype,
        max_seq_len=MAX_SEQ_LEN,
        max_sequences=len(LENGTHS),
        max_step_tokens=MAX_STEP_TOKENS,
    )


def shuffled_tables(plan: CachePlan, seed: int) -> tuple[Ints, ...]:
    """Every sequence's pages, in no order, each page in one place only."""
    rng = np.random.default_rng(seed)
    rows = len(LENGTHS)
    return tuple(
        rng.permutation(group.num_blocks)[: rows * group.table_width].reshape(rows, -1).astype(np.int32)
        for group in plan.paged
    )


def chunked_batches(chunks: Sequence[int], tables: tuple[Ints, ...] = ()) -> list[StepBatch]:
    """Steps that take the prompts' next chunk together, chunk sizes cycling; short prompts end first."""
    done = [0] * len(LENGTHS)
    batches = []
    while any(context < length for context, length in zip(done, LENGTHS, strict=True)):
        size = chunks[len(batches) % len(chunks)]
        tokens = [token_ids[context : context + size] for token_ids, context in zip(prompts(), done, strict=True)]
        batches.append(flat_batch(tokens, done, block_table=tables, state_slot=STATE_SLOTS))
        done = [context + len(new) for context, new in zip(done, tokens, strict=True)]
    return batches


def logits_of_sequences(model: ReferenceModel, batches: Sequence[StepBatch], cache: Cache) -> list[torch.Tensor]:
    """Logits [T, V] of every sequence over all of its steps."""
    parts: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    for batch in batches:
        logits = model.forward(batch, cache)
        for sequence, rows in enumerate(parts):
            rows.append(logits[batch.first_token[sequence] : batch.first_token[sequence + 1]])
    return [torch.cat(rows) for rows in parts]


@pytest.mark.parametrize("chunks", [(128,), (1,), (7,), (40, 3, 17)], ids=str)
def test_batched_and_chunked_is_alone_and_whole(model: ReferenceModel, chunks: tuple[int, ...]) -> None:
    together = logits_of_sequences(model, chunked_batches(chunks), ContiguousCache())
    for token_ids, logits in zip(prompts(), together, strict=True):
        torch.testing.assert_close(logits, model.logits(token_ids), rtol=0, atol=1e-9)


def test_logits_in_chunks(model: ReferenceModel) -> None:
    token_ids = prompts()[1]
    torch.testing.assert_close(model.logits(token_ids, chunk_tokens=13), model.logits(token_ids), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("chunks", "seed"), [((40,), 1), ((40,), 2), ((1,), 1), ((33, 5), 1)], ids=str)
def test_paged_is_contiguous_bit_for_bit(model: ReferenceModel, chunks: tuple[int, ...], seed: int) -> None:
    contiguous = logits_of_sequences(model, chunked_batches(chunks), ContiguousCache())
    batches = chunked_batches(chunks, shuffled_tables(plan(model), seed))
    paged = logits_of_sequences(model, batches, PagedCache(plan(model)))
    for ours, theirs in zip(paged, contiguous, strict=True):
        assert torch.equal(ours, theirs)


def test_windowed_groups_wrap_their_ring(model: ReferenceModel) -> None:
    """The sizes above make the paged tests reuse pages; a group that sees everything never does."""
    longest_pages = -(-max(LENGTHS) // PAGE_TOKENS)
    for group in plan(model).paged:
        assert (group.table_width < longest_pages) == (group.window_keys is not None)


def first_rows(model: ReferenceModel, row: int) -> tuple[Ints, ...]:
    """Block tables of a batch of one sequence, that of `row`."""
    return tuple(table[row : row + 1] for table in shuffled_tables(plan(model), 1))


def test_pages_never_written_hold_nan(model: ReferenceModel) -> None:
    """So that reading another sequence's page cannot pass."""
    cache = PagedCache(plan(model))
    own, other = first_rows(model, 0), first_rows(model, 1)
    model.forward(flat_batch([[5, 6, 7]], [0], block_table=own, state_slot=[0]), cache)
    assert model.forward(flat_batch([[8]], [3], block_table=own, state_slot=[0]), cache).isfinite().all()
    assert model.forward(flat_batch([[8]], [3], block_table=other, state_slot=[0]), cache).isnan().all()


def test_reference_step(model: ReferenceModel) -> None:
    first, *_ = chunked_batches((40,), shuffled_tables(plan(model), 3))
    batch = replace(first, logits_token=first.first_token[1:] - 1)
    logits = ReferenceStep(model, plan(model)).run(batch)
    assert logits.dtype == np.float32
    if model.spec.final_softcap is not None:  # the decode loop's part
        logits = softcap(torch.from_numpy(logits), model.spec.final_softcap).numpy()
    alone = np.stack([model.logits(token_ids[:40])[-1].numpy() for token_ids in prompts()])
    np.testing.assert_allclose(logits, alone, rtol=0, atol=1e-6)  # a little more than half a float32 step below 32


def test_reference_step_without_wanted_logits(model: ReferenceModel) -> None:
    step = ReferenceStep(model, plan(model))
    batch = flat_batch([[5, 6]], [0], block_table=first_rows(model, 0), state_slot=[0], logits_token=[])
    assert step.run(batch).shape == (0, model.spec.vocab_size)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_kv_dtype_rounds_what_is_read_back(tiny: TinyModel, kv_dtype: str) -> None:
    model = ReferenceModel(tiny.spec, tiny.weights, torch.float32)
    batch = flat_batch([prompts()[3]], [0], block_table=first_rows(model, 0), state_slot=[0])
    exact = ReferenceStep(model, plan(model, "float32")).run(batch)
    rounded = ReferenceStep(model, plan(model, kv_dtype)).run(batch)
    difference = np.abs(exact - rounded).max()
    assert 1e-4 < difference < 0.2 * np.abs(exact).max()


def test_int8_kv_by_hand() -> None:
    """A scale of 1: codes are the numbers, halves go to the even one; the second head has the scale 2."""
    x = torch.tensor([[[127.0, 0.5, 1.5, -2.4], [-254.0, 3.0, 0.0, 1.1]]])
    expected = torch.tensor([[[127.0, 0.0, 2.0, -2.0], [-254.0, 4.0, 0.0, 2.0]]])
    assert torch.equal(int8_kv(x), expected)
    assert torch.equal(int8_kv(torch.zeros(1, 1, 4)), torch.zeros(1, 1, 4))


def test_int8_kv_of_bad_numbers() -> None:
    """One head's NaN or infinity makes all of its dims NaN, and no other head's."""
    x = torch.ones(3, 2, 4)
    x[0, 1, 2], x[1, 0, 0] = torch.nan, -torch.inf
    kept = int8_kv(x)
    assert kept.isnan().all(dim=-1).tolist() == [[False, True], [True, False], [False, False]]


def test_missing_page(model: ReferenceModel) -> None:
    tables = first_rows(model, 0)
    for table in tables:
        table[0, 1] = NO_BLOCK
    cache = PagedCache(plan(model))
    model.forward(flat_batch([list(range(32))], [0], block_table=tables, state_slot=[0]), cache)
    with pytest.raises(BackendError, match="no page for position 32 in cache group 0"):
        model.forward(flat_batch([[5]], [32], block_table=tables, state_slot=[0]), cache)


def test_chunk_longer_than_planned(model: ReferenceModel) -> None:
    batch = flat_batch([[5] * 41], [0], block_table=first_rows(model, 0), state_slot=[0])
    with pytest.raises(BackendError, match="41 tokens in this step, but the cache was planned for at most 40"):
        model.forward(batch, PagedCache(plan(model)))


def test_contiguous_cache_takes_tokens_in_order(model: ReferenceModel) -> None:
    cache = ContiguousCache()
    model.forward(flat_batch([[5, 6]], [0]), cache)
    with pytest.raises(BackendError, match="holds 2 tokens of sequence 0, but the batch says 3"):
        model.forward(flat_batch([[7]], [3]), cache)


def test_empty_prompt(model: ReferenceModel) -> None:
    with pytest.raises(RequestError, match="no tokens"):
        model.logits([])
    assert model.generate_greedy([5], 0) == []


def test_missing_weight(tiny: TinyModel) -> None:
    weights = {name: tensor for name, tensor in tiny.weights.items() if name != "layers.1.mlp.up"}
    with pytest.raises(WeightsError, match=r"missing: layers\.1\.mlp\.up"):
        ReferenceModel(tiny.spec, weights, torch.float32)


def test_unknown_kv_dtype(model: ReferenceModel) -> None:
    with pytest.raises(BackendError, match="'int4'"):
        ReferenceStep(model, plan(model, "int4"))


@pytest.fixture
def recurrent(tmp_path: Path) -> ReferenceModel:
    tiny = tiny_model("recurrent_gemma", tmp_path)
    return ReferenceModel(tiny.spec, tiny.weights, torch.float32)


@pytest.mark.parametrize("slots", [[], [4], [-1]], ids=str)
def test_missing_state_slot(recurrent: ReferenceModel, slots: list[int]) -> None:
    batch = flat_batch([[5, 6]], [0], block_table=first_rows(recurrent, 0), state_slot=slots)
    with pytest.raises(BackendError, match="sequence 0 has no state slot"):
        recurrent.forward(batch, PagedCache(plan(recurrent)))


def test_a_state_that_nobody_computed(recurrent: ReferenceModel) -> None:
    cache = PagedCache(plan(recurrent))
    recurrent.forward(flat_batch([[5, 6]], [0], block_table=first_rows(recurrent, 0), state_slot=[0]), cache)
    later = flat_batch([[7]], [2], block_table=first_rows(recurrent, 0), state_slot=[1])
    with pytest.raises(BackendError, match="layer 0 holds no state of slot 1"):
        recurrent.forward(later, cache)


def test_a_slot_of_another_sequence_starts_anew(recurrent: ReferenceModel) -> None:
    """What the sequence before left in a slot is not read at position 0."""
    cache = PagedCache(plan(recurrent))
    first = flat_batch([prompts()[2]], [0], block_table=first_rows(recurrent, 0), state_slot=[3])
    second = flat_batch([prompts()[3]], [0], block_table=first_rows(recurrent, 0), state_slot=[3])
    recurrent.forward(first, cache)
    assert torch.equal(recurrent.forward(second, cache), recurrent.forward(second, PagedCache(plan(recurrent))))
