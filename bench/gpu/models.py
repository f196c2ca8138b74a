"""Whole models on a GPU: decode at long contexts and in batches beside the bytes that a step must read, and
prefill beside the operations that a prompt must take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gemma2_fast.bench import shapes, traffic
from gemma2_fast.bench.gpu.bars import bars_of
from gemma2_fast.bench.gpu.card import Card
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.gpu.engine import GpuEngine, Sizes
from gemma2_fast.bench.gpu.random_weights import random_tensors
from gemma2_fast.bench.gpu.rows import GpuRow, row_of
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.errors import BackendError
from gemma2_fast.reference.model import ReferenceModel
from gemma2_fast.spec import ModelSpec
from gemma2_fast.spec.families import spec_from_config

UNQUANTIZED = "bfloat16"
QUANTIZATIONS = (UNQUANTIZED, "int8", "int4")
CHECKED_STEPS = 8
LARGEST_ERROR = 3e-2  # of logits, from activations that are rounded to bfloat16 between kernels


@dataclass(frozen=True)
class DecodePlan:
    """steps: of a round; batches: at the first of the contexts."""

    size: str
    contexts: tuple[int, ...] = (128, 4096, 8192)
    batches: tuple[int, ...] = ()
    quantizations: tuple[str, ...] = QUANTIZATIONS
    steps: int = 100
    rounds: int = 3
    warmup_steps: int = 8
    checked_tokens: int = 40


@dataclass(frozen=True)
class PrefillPlan:
    sizes: tuple[str, ...] = ("9b", "2b")
    tokens: int = 8192
    repeats: int = 20
    checked_tokens: int = 40


def spec_of(size: str) -> ModelSpec:
    return spec_from_config(shapes.config(size))


def step_bytes(spec: ModelSpec, cache: CachePlan, stored: str, context: float, batch: int) -> float:
    """What a decode step must read: every weight once, the tied embedding as the head, and every sequence's keys and
    values."""
    weights = traffic.device_weight_bytes(spec, None if stored == UNQUANTIZED else stored)
    return weights + batch * traffic.cache_bytes(cache, round(context))


def decode_rows(card: Card, ceilings: GpuCeilings, plan: DecodePlan) -> Iterator[GpuRow]:
    spec = spec_of(plan.size)
    most_batch = max((1, *plan.batches))
    for stored in plan.quantizations:
        weights = random_tensors(spec, None if stored == UNQUANTIZED else stored)
        error = check_against_reference(spec, stored, plan.checked_tokens)
        with GpuEngine(spec, weights, Sizes(max_seq_len=spec.max_positions, max_batch=most_batch)) as engine:
            for context, batch in [(c, 1) for c in plan.contexts] + [(plan.contexts[0], b) for b in plan.batches]:
                yield decode_row(ceilings, engine, plan, stored, context, batch, error)
        card.free_memory()


def decode_row(
    ceilings: GpuCeilings, engine: GpuEngine, plan: DecodePlan, stored: str, context: int, batch: int, error: float
) -> GpuRow:
    """BackendError where the steps do not give what a prompt of the same tokens gives."""
    begin = room_for(engine, context, plan.steps, batch)
    engine.decode(begin, plan.warmup_steps, batch)
    seconds = [s for _ in range(plan.rounds) for s in engine.decode(begin, plan.steps, batch)]
    engine.check_decode(begin, CHECKED_STEPS, batch)
    what = f"decode {plan.size} {stored}"
    return steps_row(
        ceilings, engine, what, stored, seconds, context=begin, steps=plan.steps, batch=batch, error=error,
        bars=bars_of(what) if batch == 1 else (),
    )  # fmt: skip


def steps_row(
    ceilings: GpuCeilings, engine: GpuEngine, what: str, stored: str, seconds: Sequence[float],
    *, context: int, steps: int, batch: int = 1, **rest: Any,
) -> GpuRow:  # fmt: skip
    """Of decode steps from a context on, beside the bytes that one must read; rest: of row_of."""
    num_bytes = step_bytes(engine.spec, engine.plan.cache, stored, context + steps / 2, batch)
    shape = f"context {context} to {context + steps}, batch {batch}, {num_bytes / 1e9:.3f} GB a step"
    return row_of(what, shape, seconds, limit=ceilings.bytes(num_bytes), tokens=batch, **rest)


def room_for(engine: GpuEngine, context: int, steps: int, batch: int) -> int:
    """The context, or the longest that leaves room for the steps."""
    return min(context, engine.plan.cache.max_seq_len - steps - engine.head_start(context, batch) - 2)


def check_against_reference(spec: ModelSpec, stored: str, tokens: int) -> float:
    """The relative error of the logits of the first layers at their true shapes. BackendError where it is too large."""
    short = one_of_each(spec)
    weights = random_tensors(short, None if stored == UNQUANTIZED else stored, seed=1)
    with GpuEngine(short, weights, Sizes(max_seq_len=tokens + 1)) as engine:
        ids = engine.random_ids(tokens)
        ours = torch.from_numpy(engine.logits(ids)).double()
    exact = ReferenceModel(short, weights, torch.float32).logits(ids).double()
    error = float((ours - exact).norm() / exact.norm())
    if not error <= LARGEST_ERROR:
        raise BackendError(
            f"the logits of {len(short.layers)} layers are off the reference by {error:.2g}, at most {LARGEST_ERROR}"
        )
    return error


def one_of_each(spec: ModelSpec) -> ModelSpec:
    """The first layers alone, up to where every kind of mixer has been."""
    mixers = [layer.mixer for layer in spec.layers]
    return replace(spec, layers=spec.layers[: 1 + max(map(mixers.index, mixers))])


def prefill_rows(card: Card, ceilings: GpuCeilings, plan: PrefillPlan) -> Iterator[GpuRow]:
    """A prompt's block matrices count, neither attention nor the head, though both take their time."""
    for size in plan.sizes:
        spec = spec_of(size)
        error = check_against_reference(spec, UNQUANTIZED, plan.checked_tokens)
        tokens = min(plan.tokens, spec.max_positions - 1)
        with GpuEngine(spec, random_tensors(spec, None), Sizes(max_seq_len=spec.max_positions)) as engine:
            engine.prefill(tokens)
            seconds = [engine.prefill(tokens) for _ in range(plan.repeats)]
            engine.check_decode(min(tokens, plan.tokens // 2), CHECKED_STEPS)
        what = f"prefill {size} {UNQUANTIZED}"
        limit = ceilings.operations(float(tokens) * traffic.block_operations(spec))
        yield row_of(what, f"{tokens} tokens", seconds, limit=limit, tokens=tokens, error=error, bars=bars_of(what))
        card.free_memory()
