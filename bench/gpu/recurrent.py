"""RecurrentGemma on a GPU: its speed after a long prompt beside that after a short one, and the throughput of batches.

Its report (arXiv 2404.07839) samples after prompts of 2048 tokens, whose time does not count, in the batch that gives
most, on a TPUv5e: another machine than any GPU, so the figure stands beside ours and is no bar.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

from gemma2_fast.bench.gpu.bars import bars_of
from gemma2_fast.bench.gpu.card import Card, alternate
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.gpu.engine import GpuEngine, Sizes
from gemma2_fast.bench.gpu.models import (
    CHECKED_STEPS,
    UNQUANTIZED,
    check_against_reference,
    room_for,
    spec_of,
    steps_row,
)
from gemma2_fast.bench.gpu.random_weights import random_tensors
from gemma2_fast.bench.gpu.rows import GpuRow
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.options import MAX_LOGITS_ROWS

REPORTED = "the report: about 6000 tokens/s on a TPUv5e"


@dataclass(frozen=True)
class RecurrentPlan:
    """contexts: the short one first; most_batch: more sequences than rows of logits do not run together."""

    size: str = "recurrentgemma-2b"
    contexts: tuple[int, int] = (2100, 30_000)
    prompt_tokens: int = 2048
    most_batch: int = MAX_LOGITS_ROWS
    steps: int = 100
    rounds: int = 5
    sampling_rounds: int = 2
    warmup_steps: int = 8
    checked_tokens: int = 40


def rows(card: Card, ceilings: GpuCeilings, plan: RecurrentPlan) -> Iterator[GpuRow]:
    spec = spec_of(plan.size)
    error = check_against_reference(spec, UNQUANTIZED, plan.checked_tokens)
    sizes = Sizes(max_seq_len=max(plan.contexts) + plan.steps + CHECKED_STEPS + 2, max_batch=plan.most_batch)
    with GpuEngine(spec, random_tensors(spec, None), sizes) as engine:
        yield from decode_rows(ceilings, engine, plan, error)
        yield from sampling_rows(ceilings, engine, plan, error)
    card.free_memory()


def decode_rows(ceilings: GpuCeilings, engine: GpuEngine, plan: RecurrentPlan, error: float) -> Iterator[GpuRow]:
    """Of one sequence after each of the contexts, in turn."""
    for context in plan.contexts:
        engine.decode(context, plan.warmup_steps)
    times = alternate({context: partial(engine.decode, context, plan.steps) for context in plan.contexts}, plan.rounds)
    what, (short, long) = f"decode {plan.size} {UNQUANTIZED}", plan.contexts
    beside: dict[str, Any] = {"peers": {f"itself after {short} tokens": median(times[short])}, "bars": bars_of(what)}
    for context, rest in ((short, {}), (long, beside)):
        engine.check_decode(context, CHECKED_STEPS)
        yield steps_row(
            ceilings, engine, what, UNQUANTIZED, times[context], context=context, steps=plan.steps, error=error, **rest
        )


def sampling_rows(ceilings: GpuCeilings, engine: GpuEngine, plan: RecurrentPlan, error: float) -> Iterator[GpuRow]:
    """Of batches twice as large each, until one gives no more than the one before or the next has no room."""
    best = 0.0
    for batch in batches(engine.plan.cache, plan.most_batch):
        context = room_for(engine, plan.prompt_tokens, plan.steps, batch)
        engine.decode(context, plan.warmup_steps, batch)
        seconds = [s for _ in range(plan.sampling_rounds) for s in engine.decode(context, plan.steps, batch)]
        engine.check_decode(context, CHECKED_STEPS, batch)
        row = steps_row(
            ceilings, engine, f"sample {plan.size} {UNQUANTIZED}; {REPORTED}", UNQUANTIZED, seconds,
            context=context, steps=plan.steps, batch=batch, error=error,
        )  # fmt: skip
        yield row
        if row.tokens_per_s is None or row.tokens_per_s <= best:
            return
        best = row.tokens_per_s


def batches(cache: CachePlan, most: int) -> list[int]:
    """Powers of two of sequences that run together, their windows whole in the cache."""
    held = min(group.num_blocks // group.table_width for group in cache.paged)
    return [2**power for power in range(min(most, held, cache.max_sequences).bit_length())]
