"""States of recurrent layers that are kept, and gone on from: a snapshot of a prompt, and what follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan, plan_cache
from gemma2_fast.engine.engine import core_cache_plan, cpu_step
from gemma2_fast.engine.options import EngineOptions, plan_engine
from gemma2_fast.errors import BackendError, Gemma2FastError
from gemma2_fast.reference import ContiguousCache, ReferenceModel, ReferenceStep, flat_batch
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.tensor import Tensor
from tests.support.checkpoints import WINDOW_KEYS, quantisable_spec, random_weights
from tests.support.planned_steps import Floats, Planner, run_of

PAGE_TOKENS, STEP_TOKENS, SEQUENCES = 32, 64, 8
# Shorter than the convolution reaches back; the end of a page; past the window, at the end of a page and within one.
PROMPTS = (2, PAGE_TOKENS, 2 * PAGE_TOKENS, WINDOW_KEYS + PAGE_TOKENS + 5)
SNAPSHOT, SECOND_SNAPSHOT = SEQUENCES, SEQUENCES + 1  # slots


@cache
def model(format_name: str = "F32") -> tuple[ModelSpec, dict[str, Tensor]]:
    """Three recurrent layers and one of attention."""
    spec = quantisable_spec("recurrent_gemma")
    return spec, random_weights(spec, format_name)


def cache_plan(kv_dtype: str = "float32", family: str = "recurrent_gemma") -> CachePlan:
    spec = quantisable_spec(family)
    return plan_cache(
        spec, kv_dtype=kv_dtype, max_seq_len=256, max_sequences=SEQUENCES, max_step_tokens=STEP_TOKENS, num_snapshots=2
    )


def core_step(
    format_name: str = "F32", instruction_set: str = "auto", num_threads: int = 1
) -> tuple[_core.CpuStep, CachePlan]:
    """The CPU's step, its cache full of NaN."""
    spec, weights = model(format_name)
    options = EngineOptions(instruction_set=instruction_set, num_threads=num_threads, max_step_tokens=STEP_TOKENS)
    plan = plan_engine(spec, (format_name,), options)
    plan = replace(plan, cache=cache_plan(plan.cache.kv_dtype), max_logits_rows=STEP_TOKENS)
    step = cpu_step(plan, weights, core_cache_plan(plan.cache))
    step.poison_cache()
    return step, plan.cache


def cpu_planner(format_name: str = "F32", instruction_set: str = "auto", num_threads: int = 1) -> Planner:
    step, plan = core_step(format_name, instruction_set, num_threads)
    return Planner(run_of(step, model()[0].vocab_size), plan)


def reference_planner() -> Planner:
    plan = cache_plan()
    return Planner(ReferenceStep(ReferenceModel(*model(), torch.float32), plan).run, plan)


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, length).tolist()


def straight(planner: Planner, prompt: list[int], rest: list[int], chunk: int) -> Floats:
    """Logits of the rest after the prompt, nothing in between."""
    sequence = planner.begin(slot=0)
    planner.feed(sequence, prompt, STEP_TOKENS)
    return planner.feed(sequence, rest, chunk)


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
@pytest.mark.parametrize("format_name", ["F32", "BF16", "INT8_G128"])
def test_going_on_from_a_snapshot(format_name: str, instruction_set: str, num_threads: int) -> None:
    """Several times, in a slot that is new or another's: the bits of the prompt and the rest without a snapshot.

    The step that keeps the state gives its slot to another sequence at once.
    """
    rests = [ids(9, seed=1), ids(40, seed=2)]
    for length in PROMPTS:
        prompt = ids(length, seed=length)
        whole = cpu_planner(format_name, instruction_set, 1)
        expected = [straight(whole, prompt, rest, STEP_TOKENS) for rest in rests]
        planner = cpu_planner(format_name, instruction_set, num_threads)
        stem, other = planner.begin(slot=0), planner.begin(slot=0)
        planner.feed(stem, prompt, STEP_TOKENS)
        planner.step((other, ids(5, seed=3)), copies=[(0, SNAPSHOT)])
        for slot, rest, logits, chunk in [(2, 0, expected[0], 1), (0, 1, expected[1], 7), (2, 0, expected[0], 40)]:
            branch = planner.branch(stem, slot)
            found = planner.feed(branch, rests[rest], chunk, copies=[(SNAPSHOT, slot)])
            assert np.array_equal(found, logits), f"{length} tokens, then {chunk} at once in slot {slot}"


def test_several_at_once() -> None:
    """Two go on from one snapshot in one batch; the prompt ends with a page, so each begins one of its own."""
    prompt, rests = ids(2 * PAGE_TOKENS, seed=0), [ids(6, seed=1), ids(1, seed=2)]
    expected = [straight(cpu_planner(), prompt, rest, STEP_TOKENS) for rest in rests]
    planner = cpu_planner()
    stem, other = planner.begin(slot=5), planner.begin(slot=5)
    planner.feed(stem, prompt, STEP_TOKENS)
    planner.step((other, [7]), copies=[(5, SNAPSHOT)])
    branches = [planner.branch(stem, slot) for slot in (1, 5)]
    found = planner.step(*zip(branches, rests, strict=True), copies=[(SNAPSHOT, 1), (SNAPSHOT, 5)])
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("planner_of", [cpu_planner, reference_planner], ids=["cpu", "reference"])
def test_copies_are_carried_out_in_order(planner_of: Callable[[], Planner]) -> None:
    """Within one step: kept, copied on, gone on from, while the first slot is another's."""
    prompt, rest = ids(11, seed=0), ids(6, seed=1)
    expected = straight(planner_of(), prompt, rest, STEP_TOKENS)
    planner = planner_of()
    stem, other = planner.begin(slot=0), planner.begin(slot=0)
    planner.feed(stem, prompt, STEP_TOKENS)
    branch = planner.branch(stem, slot=3)
    copies = [(0, SNAPSHOT), (SNAPSHOT, SECOND_SNAPSHOT), (SECOND_SNAPSHOT, 3)]
    _, found = planner.step((other, [9, 9]), (branch, rest), copies=copies)
    assert np.allclose(found, expected, rtol=0, atol=1e-5 if planner_of is reference_planner else 0)


def test_the_state_kept_is_that_before_the_step() -> None:
    """The sequence itself goes on in the step that copies its state away."""
    prompt, rest = ids(11, seed=0), ids(6, seed=1)
    planner = cpu_planner()
    stem = planner.begin(slot=0)
    planner.feed(stem, prompt, STEP_TOKENS)
    branch = planner.branch(stem, slot=4)
    (expected,) = planner.step((stem, rest), copies=[(0, SNAPSHOT)])
    (found,) = planner.step((branch, rest), copies=[(SNAPSHOT, 4)])
    assert np.array_equal(found, expected)


NUM_SLOTS = SEQUENCES + 2


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ([(0, NUM_SLOTS)], f"from slot 0 to {NUM_SLOTS}, expected two different ones of the cache's {NUM_SLOTS}"),
        ([(-1, 3)], "from slot -1 to 3, expected two different"),
        ([(3, 3)], "from slot 3 to 3, expected two different"),
        ([(0, SNAPSHOT), (0, 2)], "from slot 0 to 2, but sequence 1 of this slot begins in this step"),
    ],
    ids=["no such slot", "before the first", "itself", "a state that is not read"],
)
def test_copies_that_make_no_sense(copies: list[tuple[int, int]], message: str) -> None:
    planner = cpu_planner()
    first, second = planner.begin(slot=0), planner.begin(slot=2)
    planner.step((first, [5]))
    with pytest.raises(Gemma2FastError, match=message):
        planner.step((first, [6]), (second, [7]), copies=copies)


def test_no_sequence_computes_in_the_slot_of_a_snapshot() -> None:
    for planner in (cpu_planner(), reference_planner()):
        with pytest.raises(Gemma2FastError, match=r"slots? .*for sequences"):
            planner.step((planner.begin(slot=SNAPSHOT), [5]))


def test_a_model_without_states() -> None:
    spec = quantisable_spec("gemma2")
    plan = plan_engine(spec, ("F32",), EngineOptions(num_threads=1, max_step_tokens=STEP_TOKENS))
    plan = replace(plan, cache=cache_plan(family="gemma2"), max_logits_rows=STEP_TOKENS)
    step = cpu_step(plan, random_weights(spec, "F32"), core_cache_plan(plan.cache))
    tables = tuple(np.zeros((1, group.table_width), np.int32) for group in plan.cache.paged)
    with pytest.raises(Gemma2FastError, match="from slot 0 to 1, expected two different ones of the cache's 0"):
        step.run(flat_batch([[5]], [0], block_table=tables, state_copies=[(0, 1)]), spec.vocab_size)


def test_copies_that_the_reference_refuses() -> None:
    planner = reference_planner()
    sequence = planner.begin(slot=0)
    with pytest.raises(BackendError, match=f"from slot 0 to {NUM_SLOTS}, expected two different ones"):
        planner.step((sequence, [5]), copies=[(0, NUM_SLOTS)])
    with pytest.raises(BackendError, match="layer 0 holds no state of slot 4"):
        planner.step((sequence, [5]), copies=[(4, SNAPSHOT)])
    batch = flat_batch([[5]], [0], state_copies=[(0, 1)])
    with pytest.raises(BackendError, match="a contiguous cache has no state slots"):
        ReferenceModel(*model(), torch.float32).forward(batch, ContiguousCache())


@pytest.mark.parametrize(
    "change",
    [
        {"positions": [0, 2]},
        {"positions": [0]},
        {"first_token": [0, 1]},
        {"first_token": [0, 3]},
        {"first_token": [0]},
        {"first_token": [0, 0, 2], "context_tokens": [0, 0]},
        {"logits_token": [2]},
        {"context_tokens": [-1], "positions": [-1, 0]},
    ],
    ids=str,
)
def test_a_batch_that_is_not_flat(change: dict[str, list[int]]) -> None:
    step, plan = core_step()
    tables = tuple(np.zeros((1, group.table_width), np.int32) for group in plan.paged)
    batch = flat_batch([[5, 6]], [0], block_table=tables, state_slot=[0])
    step.run(batch, 512)
    with pytest.raises(Gemma2FastError, match="tokens of one sequence after another"):
        step.run(replace(batch, **{name: np.array(values, np.int32) for name, values in change.items()}), 512)
