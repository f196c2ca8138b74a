"""Steps planned by hand, without a scheduler: which pages and which state slot a sequence has is the test's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.step_batch import Ints, StepBatch
from gemma2_fast.reference.batch import flat_batch

Floats = NDArray[np.float32]
Copies = tuple[tuple[int, int], ...] | list[tuple[int, int]]  # of states: slots from and to
Run = Callable[[StepBatch], Floats]  # one step of a backend: logits [L, V]


@dataclass
class Sequence:
    """What is in the cache: keys and values in the blocks of `tables`, a row a paged group, and a state in `slot`."""

    tables: list[Ints]
    slot: int
    num_tokens: int = 0


class Planner:
    """Hands out pages and runs steps. Slots are taken as given; the plan's last ones are for snapshots."""

    def __init__(self, run: Run, plan: CachePlan) -> None:
        self._run = run
        self._plan = plan
        rng = np.random.default_rng(0)
        shuffled = [rng.permutation(group.num_blocks).astype(np.int32) for group in plan.paged]
        self._rows = [
            list(blocks.reshape(-1, group.table_width)) for blocks, group in zip(shuffled, plan.paged, strict=True)
        ]

    def begin(self, slot: int) -> Sequence:
        return Sequence([rows.pop() for rows in self._rows], slot)

    def branch(self, stem: Sequence, slot: int) -> Sequence:
        """A sequence with the same tokens, whose visible pages it shares; all others are its own."""
        branch = self.begin(slot)
        branch.num_tokens = stem.num_tokens
        for group, own, shared in zip(self._plan.paged, branch.tables, stem.tables, strict=True):
            oldest = max(0, stem.num_tokens + 1 - (group.window_keys or stem.num_tokens + 1))
            for page in range(oldest // self._plan.page_tokens, -(-stem.num_tokens // self._plan.page_tokens)):
                own[page % group.table_width] = shared[page % group.table_width]
        return branch

    def step(self, *work: tuple[Sequence, list[int]], copies: Copies = ()) -> list[Floats]:
        """Logits [new tokens, V] of each sequence."""
        sequences, tokens = [sequence for sequence, _ in work], [new for _, new in work]
        batch = flat_batch(
            tokens,
            [sequence.num_tokens for sequence in sequences],
            block_table=tuple(
                np.stack([sequence.tables[index] for sequence in sequences]) for index in range(len(self._plan.paged))
            ),
            state_slot=[sequence.slot for sequence in sequences],
            state_copies=copies,
        )
        logits = self._run(batch)
        for sequence, new in work:
            sequence.num_tokens += len(new)
        return [logits[first:end] for first, end in zip(batch.first_token, batch.first_token[1:], strict=False)]

    def feed(self, sequence: Sequence, tokens: list[int], chunk: int, copies: Copies = ()) -> Floats:
        """Alone, in steps of `chunk` tokens, the first of them with the copies."""
        parts = []
        for first in range(0, len(tokens), chunk):
            parts += self.step((sequence, tokens[first : first + chunk]), copies=copies if first == 0 else ())
        return np.concatenate(parts)


def run_of(step: _core.ModelStep, vocab_size: int) -> Run:
    return lambda batch: step.run(batch, vocab_size)
