"""What stays between steps: keys and values in one growing buffer a sequence or in the pages of a CachePlan, and the
states of recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.errors import BackendError
from gemma2_fast.reference.dtypes import torch_dtype
from gemma2_fast.reference.int8_kv import int8_kv


@dataclass(frozen=True)
class LayerState:
    """What one sequence carries through a recurrent layer: recurrence [R] and the last inputs conv_tail [C - 1, R]."""

    recurrence: Tensor
    conv_tail: Tensor


class Cache(Protocol):
    """Keys and values or the state of every layer. A sequence is a row of the batch; positions are absolute."""

    def copy_states(self, batch: StepBatch) -> None:
        """Carry out the batch's state_copies, before anything else of it."""

    def append(self, layer: int, batch: StepBatch, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, K, D] of the batch's tokens."""

    def read(self, layer: int, batch: StepBatch, sequence: int, first_key: int, end_key: int) -> tuple[Tensor, Tensor]:
        """Keys and values [end_key - first_key, K, D] of one sequence, in the dtype of the cache."""

    def write_state(self, layer: int, batch: StepBatch, sequence: int, state: LayerState) -> None:
        """Store the state after the sequence's last token of this batch."""

    def read_state(self, layer: int, batch: StepBatch, sequence: int) -> LayerState:
        """The state before this batch of a sequence that has one: where it begins, there is nothing to read."""


def token_spans(batch: StepBatch) -> Iterator[tuple[int, int, int, int]]:
    """(sequence, first token, end token, first position) of every sequence that has tokens in this step."""
    for sequence, context in enumerate(batch.context_tokens):
        first, end = int(batch.first_token[sequence]), int(batch.first_token[sequence + 1])
        if first < end:
            yield sequence, first, end, int(context)


class ContiguousCache:
    """All keys and values, whatever the window. Row s of every batch is the same sequence s, in the model's dtype."""

    def __init__(self) -> None:
        self._stored: dict[tuple[int, int], tuple[Tensor, int]] = {}  # buffer [2, capacity, K, D], tokens in it
        self._states: dict[tuple[int, int], LayerState] = {}  # (layer, sequence)

    def copy_states(self, batch: StepBatch) -> None:
        if len(batch.state_copies):
            raise BackendError("a contiguous cache has no state slots, but the batch copies states; use a paged one")

    def append(self, layer: int, batch: StepBatch, keys: Tensor, values: Tensor) -> None:
        for sequence, first, end, context in token_spans(batch):
            new = torch.stack((keys[first:end], values[first:end]))
            buffer, length = self._stored.get((layer, sequence), (new[:, :0], 0))
            if length != context:
                raise BackendError(
                    f"layer {layer} holds {length} tokens of sequence {sequence}, but the batch says {context}; "
                    "a contiguous cache takes every token of a sequence once and in order"
                )
            total = length + end - first
            if total > buffer.shape[1]:
                # Doubling keeps the cost of appending one token at a time linear.
                grown = new.new_empty((2, max(total, 2 * length), *new.shape[2:]))
                grown[:, :length] = buffer[:, :length]
                buffer = grown
            buffer[:, length:total] = new
            self._stored[layer, sequence] = buffer, total

    def read(self, layer: int, batch: StepBatch, sequence: int, first_key: int, end_key: int) -> tuple[Tensor, Tensor]:
        buffer, _ = self._stored[layer, sequence]
        keys, values = buffer[:, first_key:end_key]
        return keys, values

    def write_state(self, layer: int, batch: StepBatch, sequence: int, state: LayerState) -> None:
        self._states[layer, sequence] = state

    def read_state(self, layer: int, batch: StepBatch, sequence: int) -> LayerState:
        return _known_state(self._states, layer, sequence, f"sequence {sequence}")


class PagedCache:
    """The groups of a CachePlan, found through the batch's block tables and state slots. Slots of pages never
    written hold NaN.

    keys and values a layer: [N, P, K, D] in the plan's kv_dtype; int8 is kept as the float32 values that its codes
    stand for. A windowed group's table is a ring: column b % table_width.
    """

    def __init__(self, plan: CachePlan) -> None:
        self._plan = plan
        state = plan.recurrent
        self._recurrent_layers, self._num_slots = ((), 0) if state is None else (state.layers, state.num_slots)
        self._num_sequence_slots = 0 if state is None else state.num_slots - state.num_snapshots
        self._states: dict[tuple[int, int], LayerState] = {}  # (layer, slot)
        dtype = torch.float32 if plan.kv_dtype == "int8" else torch_dtype(plan.kv_dtype)
        self._group_of_layer = {layer: index for index, group in enumerate(plan.paged) for layer in group.layers}
        self._pages: dict[int, Tensor] = {}  # layer → [2, N, P, K, D]
        for group in plan.paged:
            shape = (2, group.num_blocks, plan.page_tokens, group.num_kv_heads, group.head_dim)
            self._pages |= {layer: torch.full(shape, torch.nan, dtype=dtype) for layer in group.layers}

    def copy_states(self, batch: StepBatch) -> None:
        for source, target in batch.state_copies.tolist():
            if source == target or not {source, target} <= set(range(self._num_slots)):
                raise BackendError(
                    f"a state is copied from slot {source} to {target}, expected two different ones of the cache's "
                    f"{self._num_slots}"
                )
            for layer in self._recurrent_layers:
                self._states[layer, target] = _known_state(self._states, layer, source, f"slot {source}")

    def append(self, layer: int, batch: StepBatch, keys: Tensor, values: Tensor) -> None:
        for sequence, first, end, context in token_spans(batch):
            if end - first > self._plan.max_step_tokens:
                raise BackendError(
                    f"sequence {sequence} has {end - first} tokens in this step, but the cache was planned for at most "
                    f"{self._plan.max_step_tokens}"
                )
            blocks, slots = self._slots(layer, batch, sequence, context, context + end - first)
            new = torch.stack((keys[first:end], values[first:end]))
            kept = int8_kv(new) if self._plan.kv_dtype == "int8" else new
            self._pages[layer][:, blocks, slots] = kept.to(self._pages[layer].dtype)

    def read(self, layer: int, batch: StepBatch, sequence: int, first_key: int, end_key: int) -> tuple[Tensor, Tensor]:
        blocks, slots = self._slots(layer, batch, sequence, first_key, end_key)
        keys, values = self._pages[layer][:, blocks, slots]
        return keys, values

    def write_state(self, layer: int, batch: StepBatch, sequence: int, state: LayerState) -> None:
        self._states[layer, self._state_slot(batch, sequence)] = state

    def read_state(self, layer: int, batch: StepBatch, sequence: int) -> LayerState:
        slot = self._state_slot(batch, sequence)
        return _known_state(self._states, layer, slot, f"slot {slot}")

    def _state_slot(self, batch: StepBatch, sequence: int) -> int:
        slot = int(batch.state_slot[sequence]) if sequence < len(batch.state_slot) else -1
        if not 0 <= slot < self._num_sequence_slots:
            raise BackendError(
                f"sequence {sequence} has no state slot: the batch names {batch.state_slot.tolist()}, the cache has "
                f"slots 0..{self._num_sequence_slots - 1} for sequences"
            )
        return slot

    def _slots(self, layer: int, batch: StepBatch, sequence: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """The page and the slot in it of every position in first..end-1."""
        index = self._group_of_layer[layer]
        group = self._plan.paged[index]
        positions = torch.arange(first, end)
        row = torch.tensor(batch.block_table[index][sequence], dtype=torch.int64)
        blocks = row[positions // self._plan.page_tokens % group.table_width]
        wrong = (blocks < 0) | (blocks >= group.num_blocks)
        if wrong.any():
            raise BackendError(
                f"sequence {sequence} has no page for position {int(positions[wrong][0])} in cache group {index}: its "
                f"block table names {int(blocks[wrong][0])}, the group has pages 0..{group.num_blocks - 1}"
            )
        return blocks, positions % self._plan.page_tokens


def _known_state(states: dict[tuple[int, int], LayerState], layer: int, index: int, owner: str) -> LayerState:
    if (layer, index) not in states:
        raise BackendError(f"layer {layer} holds no state of {owner}; its first tokens must have been computed here")
    return states[layer, index]
