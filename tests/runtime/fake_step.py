"""A model step that computes nothing but checks everything the scheduler promises about the cache.

Its pages hold token ids and their positions, and its logits are a function of exactly the tokens a query may see, read
back through the block table. A stale, foreign, missing or overwritten block changes a position or a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.step_batch import NO_BLOCK, StepBatch

PAGE_TOKENS = 4
VOCAB_SIZE = 97
DAMAGED = 96  # a visible token with this id makes the row NaN
FAILING = 95  # a step with this id among its tokens raises


@dataclass(frozen=True)
class Group:
    window_keys: int | None
    num_blocks: int
    table_width: int

    def core(self) -> _core.PagedKvGroup:
        return _core.PagedKvGroup(
            layers=[0],
            num_kv_heads=1,
            head_dim=1,
            window_keys=self.window_keys,
            num_blocks=self.num_blocks,
            table_width=self.table_width,
        )


def ring_width(window_keys: int, max_step_tokens: int, max_seq_len: int) -> int:
    """Columns for the window and one step's chunk wherever they begin in a page."""
    num_tokens = window_keys - 1 + max_step_tokens
    return min(-(-(num_tokens - 1) // PAGE_TOKENS) + 1, -(-max_seq_len // PAGE_TOKENS))


def next_logits(visible: Sequence[NDArray[np.int64]], state: int) -> NDArray[np.float32]:
    """The made-up model: one row of logits from what each group lets a query see, and a recurrent state."""
    mixed = state
    for tokens in visible:
        weights = np.arange(len(tokens), 0, -1, dtype=np.int64) ** 2 + 3
        mixed = (mixed * 31 + int((tokens + 1) @ weights)) % 1_000_003
    ids = np.arange(VOCAB_SIZE, dtype=np.int64)
    logits = ((mixed + 1) * (ids * ids + 7 * ids + 3) % 10_007) / 10_007 * 12 - 6
    logits[FAILING:] = -np.inf
    return logits.astype(np.float32)


def next_state(state: int, token: int) -> int:
    return (state * 131 + token + 1) % 1_000_003


def expected_logits(tokens: Sequence[int], groups: Sequence[Group], recurrent: bool) -> NDArray[np.float32]:
    """The made-up model without any cache: the row after the last token."""
    history = np.array(tokens, dtype=np.int64)
    state = 0
    for token in tokens if recurrent else ():
        state = next_state(state, token)
    return next_logits([history[-(group.window_keys or len(tokens)) :] for group in groups], state)


def expected_greedy(
    prompt: Sequence[int], num_tokens: int, groups: Sequence[Group], recurrent: bool = False
) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(np.argmax(expected_logits(tokens, groups, recurrent))))
    return tokens[len(prompt) :]


@dataclass
class FakeStep:
    groups: Sequence[Group]
    num_slots: int = 0
    host_every: int | None = None  # every so many rows `choose` leaves to the host
    num_rows_chosen: int = 0
    num_snapshots: int = 0  # the last of the slots
    steps: list[tuple[int, int]] = field(default_factory=list)  # tokens and rows of logits of each
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = [np.full((group.num_blocks, PAGE_TOKENS), -1, np.int64) for group in self.groups]
        self.positions = [np.full((group.num_blocks, PAGE_TOKENS), -1, np.int64) for group in self.groups]
        self.state = [0] * self.num_slots
        self.state_tokens = [-1] * self.num_slots

    def plan(self) -> _core.CachePlan:
        recurrent = None
        if self.num_slots:
            recurrent = _core.RecurrentStateGroup(
                layers=[1], width=1, conv_tail=3, num_slots=self.num_slots, num_snapshots=self.num_snapshots
            )
        return _core.CachePlan(
            page_tokens=PAGE_TOKENS, paged=[group.core() for group in self.groups], recurrent=recurrent
        )

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        try:
            return self._run(batch)
        except AssertionError as fault:
            self.faults.append(str(fault))
            raise

    def _run(self, batch: StepBatch) -> NDArray[np.float32]:
        self.steps.append((len(batch.token_ids), len(batch.logits_token)))
        if FAILING in batch.token_ids:
            raise ValueError("a token that this step cannot take")
        self._check_shape(batch)
        rows: list[NDArray[np.float32]] = []
        for s, context in enumerate(batch.context_tokens.tolist()):
            first, end = int(batch.first_token[s]), int(batch.first_token[s + 1])
            tokens = batch.token_ids[first:end].tolist()
            states = self._advance_state(batch, s, context, tokens)
            for g in range(len(self.groups)):
                self._append(g, batch.block_table[g][s], context, tokens)
            for row in batch.logits_token[(batch.logits_token >= first) & (batch.logits_token < end)].tolist():
                position = int(batch.positions[row])
                visible = [self._visible(g, batch.block_table[g][s], position) for g in range(len(self.groups))]
                damaged = any(DAMAGED in tokens for tokens in visible)
                rows.append(next_logits(visible, states[row - first]) * (np.float32("nan") if damaged else 1))
        return np.stack(rows) if rows else np.empty((0, VOCAB_SIZE), np.float32)

    def choose(self, logits: NDArray[np.float32], rules: Sequence[tuple[_core.SamplingParams, int]]) -> list[int]:
        """Greedy alone; a row without numbers is the host's."""
        assert all(params.temperature == 0 for params, _ in rules)
        tokens = []
        for row in logits:
            self.num_rows_chosen += 1
            to_host = bool(self.host_every) and self.num_rows_chosen % (self.host_every or 1) == 0
            tokens.append(-1 if to_host or np.isnan(row).any() else int(np.argmax(row)))
        return tokens

    def _check_shape(self, batch: StepBatch) -> None:
        num_sequences = len(batch.context_tokens)
        assert batch.first_token[0] == 0, "first_token begins elsewhere"
        assert batch.first_token[-1] == len(batch.token_ids), "first_token ends elsewhere"
        assert np.all(np.diff(batch.first_token) > 0), "a sequence without tokens"
        assert np.all(np.diff(batch.logits_token) > 0), "logits_token must ascend"
        for s in range(num_sequences):
            span = batch.positions[batch.first_token[s] : batch.first_token[s + 1]]
            assert np.array_equal(span, batch.context_tokens[s] + np.arange(len(span))), "positions must follow on"
        for group, table in zip(self.groups, batch.block_table, strict=True):
            assert table.shape == (num_sequences, group.table_width), "block table shape"
            held = table[table != NO_BLOCK]
            assert len(set(held.tolist())) == len(held), "two sequences, or two columns, share a block"
            assert np.all((held >= 0) & (held < group.num_blocks)), "block id outside the pool"
        assert len(batch.state_slot) == (num_sequences if self.num_slots else 0), "state slots"
        assert len(set(batch.state_slot.tolist())) == len(batch.state_slot), "two sequences share a state slot"
        assert np.all(batch.state_slot < self.num_slots - self.num_snapshots), "a sequence in the slot of a snapshot"
        assert batch.state_copies.shape == (0, 2), "the loop copies no states"

    def _advance_state(self, batch: StepBatch, s: int, context: int, tokens: list[int]) -> list[int]:
        if not self.num_slots:
            return [0] * len(tokens)
        slot = int(batch.state_slot[s])
        if context == 0:
            self.state[slot], self.state_tokens[slot] = 0, 0
        assert self.state_tokens[slot] == context, "the slot holds another sequence's state"
        states = []
        for token in tokens:
            self.state[slot] = next_state(self.state[slot], token)
            states.append(self.state[slot])
        self.state_tokens[slot] += len(tokens)
        return states

    def _append(self, g: int, table: NDArray[np.int32], context: int, tokens: list[int]) -> None:
        for position, token in enumerate(tokens, context):
            block = table[position // PAGE_TOKENS % len(table)]
            assert block != NO_BLOCK, f"no block for position {position}"
            self.tokens[g][block, position % PAGE_TOKENS] = token
            self.positions[g][block, position % PAGE_TOKENS] = position
        # Later tokens of the chunk must not have overwritten what its first query sees.
        first_visible = max(0, context - (self.groups[g].window_keys or context + 1) + 1)
        self._read(g, table, first_visible, context + len(tokens))

    def _visible(self, g: int, table: NDArray[np.int32], position: int) -> NDArray[np.int64]:
        window = self.groups[g].window_keys or position + 1
        return self._read(g, table, max(0, position - window + 1), position + 1)

    def _read(self, g: int, table: NDArray[np.int32], first: int, end: int) -> NDArray[np.int64]:
        wanted = np.arange(first, end)
        blocks = table[wanted // PAGE_TOKENS % len(table)]
        assert NO_BLOCK not in blocks, f"a visible key between {first} and {end} has no block"
        assert np.array_equal(self.positions[g][blocks, wanted % PAGE_TOKENS], wanted), "a block holds other positions"
        return self.tokens[g][blocks, wanted % PAGE_TOKENS]


def prompt_of(length: int, seed: int = 0) -> list[int]:
    ids: list[int] = np.random.default_rng(1000 * seed + length).integers(0, FAILING, length).tolist()
    return ids


def collect(loop: _core.DecodeLoop, sequence_id: int, timeout_s: float = 20.0) -> list[_core.TokenEvent]:
    """Every event of a sequence to its end."""
    events: list[_core.TokenEvent] = []
    while not events or events[-1].finish_reason is None:
        new = loop.wait(sequence_id, timeout_s)
        assert new, f"sequence {sequence_id} told nothing for {timeout_s} s: {loop.stats()}"
        events += new
    return events


def ids_of(events: Sequence[_core.TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]
