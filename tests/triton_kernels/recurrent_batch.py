"""A ragged batch in one recurrent layer, with its weights and states as the GPU kernels read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemma2_fast.reference.block_diagonal import block_diagonal
from gemma2_fast.reference.conv1d import conv1d
from gemma2_fast.reference.geglu import geglu
from gemma2_fast.reference.rg_lru import rg_lru

TAPS = 4


@dataclass(frozen=True)
class Layer:
    """Decays leave 0.9 to 0.999 of a state where a gate is open."""

    conv: Tensor  # [R, TAPS]
    conv_bias: Tensor
    input_gate: Tensor  # [blocks, W, W] as (block, in, out)
    recurrence_gate: Tensor
    input_gate_bias: Tensor  # [R]
    recurrence_gate_bias: Tensor
    decay: Tensor

    @classmethod
    def make(cls, num_blocks: int = 2, block_width: int = 16, seed: int = 0) -> Layer:
        draw = _normal(seed)
        width = num_blocks * block_width
        kept = 0.9 + 0.099 * torch.rand(width, generator=torch.Generator().manual_seed(seed))
        gate = (num_blocks, block_width, block_width)
        return cls(
            conv=draw(width, TAPS) / 2,
            conv_bias=draw(width) / 4,
            input_gate=draw(*gate) / math.sqrt(block_width),
            recurrence_gate=draw(*gate) / math.sqrt(block_width),
            input_gate_bias=draw(width),
            recurrence_gate_bias=draw(width),
            decay=torch.expm1(-kept.log() / 8).log(),
        )

    @property
    def width(self) -> int:
        return len(self.conv)


@dataclass(frozen=True)
class RecurrentBatch:
    """`lengths`: of each sequence the tokens before the step, and the new ones.

    Of each sequence `inputs` [TAPS - 1 + new, R], the earlier ones first, `branch` [new, R] and `state` [R]. What was
    before position 0 is NaN in ring and states, as are slots of no sequence.
    """

    layer: Layer
    lengths: tuple[tuple[int, int], ...]
    inputs: tuple[Tensor, ...]
    branch: tuple[Tensor, ...]
    state: tuple[Tensor, ...]
    slots: tuple[int, ...]

    @classmethod
    def make(cls, layer: Layer, lengths: Sequence[tuple[int, int]], seed: int = 0) -> RecurrentBatch:
        draw = _normal(seed + 1)
        slots = torch.randperm(len(lengths) + 2, generator=torch.Generator().manual_seed(seed))
        return cls(
            layer,
            tuple(lengths),
            tuple(draw(TAPS - 1 + new, layer.width) for _, new in lengths),
            tuple(2 * draw(new, layer.width) for _, new in lengths),
            tuple(draw(layer.width) for _ in lengths),
            tuple(slots[: len(lengths)].tolist()),
        )

    def rows(self) -> Tensor:
        """x and y side by side, [T, 2 R]."""
        inputs = torch.cat([rows[TAPS - 1 :] for rows in self.inputs])
        return torch.cat([inputs, torch.cat(self.branch)], dim=1)

    def ring(self) -> Tensor:
        """[slots, TAPS, R], the input of position p in row p % TAPS."""
        ring = torch.full((len(self.slots) + 2, TAPS, self.layer.width), math.nan)
        for slot, (context, _), rows in zip(self.slots, self.lengths, self.inputs, strict=True):
            for back in range(1, min(TAPS - 1, context) + 1):
                ring[slot, (context - back) % TAPS] = rows[TAPS - 1 - back]
        return ring

    def states(self) -> Tensor:
        """[slots, R]"""
        states = torch.full((len(self.slots) + 2, self.layer.width), math.nan)
        for slot, (context, _), state in zip(self.slots, self.lengths, self.state, strict=True):
            if context:
                states[slot] = state
        return states

    def ring_afterwards(self) -> Tensor:
        ring = self.ring()
        for slot, (context, new), rows in zip(self.slots, self.lengths, self.inputs, strict=True):
            for index in range(new):
                ring[slot, (context + index) % TAPS] = rows[TAPS - 1 + index]
        return ring

    def part(self, begin: int, end: int) -> RecurrentBatch:
        """Of each sequence's new tokens those from `begin` to `end`, the ones before taken for done."""
        spans = [(min(begin, new), min(end, new)) for _, new in self.lengths]
        return replace(
            self,
            lengths=tuple((context + a, b - a) for (context, _), (a, b) in zip(self.lengths, spans, strict=True)),
            inputs=tuple(rows[a : TAPS - 1 + b] for rows, (a, b) in zip(self.inputs, spans, strict=True)),
            branch=tuple(rows[a:b] for rows, (a, b) in zip(self.branch, spans, strict=True)),
        )

    @property
    def state_slot(self) -> Tensor:
        return _int32(self.slots)

    @property
    def first_token(self) -> Tensor:
        return _int32([sum(new for _, new in self.lengths[:s]) for s in range(len(self.lengths) + 1)])

    @property
    def context_tokens(self) -> Tensor:
        return _int32([context for context, _ in self.lengths])

    @property
    def token_sequence(self) -> Tensor:
        return _int32([s for s, (_, new) in enumerate(self.lengths) for _ in range(new)])

    @property
    def positions(self) -> Tensor:
        return _int32([context + i for context, new in self.lengths for i in range(new)])

    def convolved(self, dtype: torch.dtype) -> Tensor:
        """[T, R] in the dtype."""
        conv, bias = self.layer.conv[:, None].to(dtype), self.layer.conv_bias.to(dtype)
        return torch.cat(
            [
                conv1d(rows[TAPS - 1 :], conv, bias, rows[: TAPS - 1], torch.arange(context, context + new))[0]
                for (context, new), rows in zip(self.lengths, (rows.to(dtype) for rows in self.inputs), strict=True)
            ]
        )

    def gates(self, conv: Tensor) -> tuple[Tensor, Tensor]:
        """Both [T, R] from the convolution [T, R], in its dtype."""
        layer, shape = self.layer, self.layer.input_gate.shape[:2]
        input_gate, recurrence_gate = (
            block_diagonal(conv, weight.to(conv.dtype), bias.to(conv.dtype).view(shape))
            for weight, bias in (
                (layer.input_gate, layer.input_gate_bias),
                (layer.recurrence_gate, layer.recurrence_gate_bias),
            )
        )
        return input_gate, recurrence_gate

    def reference(self, dtype: torch.dtype, resets: bool = True) -> tuple[Tensor, Tensor]:
        """out [T, R] and the states [S, R] afterwards, in the dtype; of a sequence without tokens the state as it was.

        Without `resets` a first token finds a state.
        """
        conv = self.convolved(dtype)
        outs, states, begin = [], [], 0
        for (context, new), branch, state in zip(self.lengths, self.branch, self.state, strict=True):
            last = state.to(dtype)
            if new:
                values = conv[begin : begin + new]
                positions = torch.arange(context, context + new) + (not resets)
                rows, last = rg_lru(values, *self.gates(values), self.layer.decay.to(dtype), last, positions)
                outs.append(geglu(branch.to(dtype), rows))
            states.append(last)
            begin += new
        return torch.cat(outs), torch.stack(states)


def _normal(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
