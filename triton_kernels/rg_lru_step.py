"""All of a recurrent layer that lies between its matrices, for sequences of one new token: decoding in one kernel.

A program computes a few channels of sixteen sequences. Their gates need the convolution of the whole block, which every
program of a block computes for itself: it reads four inputs a channel, the gates a column of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.conv1d import CONV_TAPS, convolved
from gemma2_fast.triton_kernels.numerics import gelu_tanh
from gemma2_fast.triton_kernels.rg_lru import GATE_BLOCK_WIDTH, add_gates, gated, rate_of
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import tuned

SEQUENCES = 16  # of a program: the least that matrix units take


@triton.jit
def rg_lru_step_kernel(
    x, y, row_stride, inputs_ring, states, state_slot, first_token, context_tokens, weight, bias, input_gate,
    recurrence_gate, input_gate_bias, recurrence_gate_bias, decay, out, width, num_sequences,
    TAPS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, SEQUENCES: tl.constexpr, CHANNELS: tl.constexpr,
    COLS: tl.constexpr,
):  # fmt: skip
    """out = gelu_tanh(y) * h of one token a sequence: conv1d_kernel, rg_lru_gates_kernel and rg_lru_scan_kernel in one.

    The arguments are theirs. The token of sequence s is first_token[s], or none if first_token[s + 1] is the same: then
    the sequence is left alone. S = num_sequences; CHANNELS and COLS divide W = BLOCK_WIDTH. Computed in float32 but for
    the convolution, which is rounded as conv1d_kernel stores it; out is rounded once. out must not be x.
    Grid: (R / CHANNELS, S / SEQUENCES, rounded up).
    """
    tl.static_assert(BLOCK_WIDTH % CHANNELS == 0, "the channels of a program must lie in one block")
    tl.static_assert(BLOCK_WIDTH % COLS == 0, "a block must be whole steps along its inputs")
    sequence = (tl.program_id(1) * SEQUENCES + tl.arange(0, SEQUENCES))[:, None]
    exists = sequence < num_sequences
    token = tl.load(first_token + sequence, mask=exists, other=0)
    present = exists & (tl.load(first_token + sequence + 1, mask=exists, other=0) > token)
    position = tl.load(context_tokens + sequence, mask=present, other=0)
    slot = tl.load(state_slot + sequence, mask=present, other=0).to(tl.int64)
    token = token.to(tl.int64)
    x_row = x + token * row_stride
    ring = inputs_ring + slot * TAPS * width

    first_channel = tl.program_id(0) * CHANNELS
    channel = first_channel + tl.arange(0, CHANNELS)
    block = first_channel // BLOCK_WIDTH * BLOCK_WIDTH
    input_sums = tl.zeros([SEQUENCES, CHANNELS], tl.float32)
    recurrence_sums = tl.zeros([SEQUENCES, CHANNELS], tl.float32)
    for begin in range(0, BLOCK_WIDTH, COLS):
        row = block + begin + tl.arange(0, COLS)
        values = convolved(x_row, row_stride, ring, width, position, 0, row, present, weight, bias, TAPS)
        input_sums, recurrence_sums = add_gates(
            input_sums, recurrence_sums, values.to(x.dtype.element_ty), row, channel, input_gate, recurrence_gate,
            BLOCK_WIDTH,
        )  # fmt: skip

    values = convolved(x_row, row_stride, ring, width, position, 0, channel, present, weight, bias, TAPS)
    kept, added = gated(
        values.to(x.dtype.element_ty).to(tl.float32),
        input_sums + tl.load(input_gate_bias + channel),
        recurrence_sums + tl.load(recurrence_gate_bias + channel),
        rate_of(tl.load(decay + channel)),
        position == 0,
    )
    places = states + slot * width + channel
    state = kept * tl.load(places, mask=present & (position > 0), other=0.0) + added
    tl.store(places, state, mask=present)
    tl.store(ring + position % TAPS * width + channel, tl.load(x_row + channel, mask=present, other=0.0), mask=present)
    branch = tl.load(y + token * row_stride + channel, mask=present, other=0.0).to(tl.float32)
    tl.store(out + token * width + channel, (gelu_tanh(branch) * state).to(out.dtype.element_ty), mask=present)


def rg_lru_step(
    x: Any, y: Any, inputs_ring: Any, states: Any, state_slot: Any, first_token: Any, context_tokens: Any, weight: Any,
    bias: Any, input_gate: Any, recurrence_gate: Any, input_gate_bias: Any, recurrence_gate_bias: Any, decay: Any,
    out: Any, *, channels: int, cols: int, num_warps: int = 4, num_stages: int = 3,
) -> None:  # fmt: skip
    """x, y [T, R], whose tokens may lie apart; inputs_ring [slots, TAPS, R] and states [slots, R] float32, updated;
    state_slot and context_tokens [S], first_token [S + 1] int32; weight [R, TAPS], bias, biases of gates and decay [R]
    float32; gate weights [blocks, W, W]; out [T, R]."""
    num_sequences, width = state_slot.shape[0], out.shape[1]
    rg_lru_step_kernel[(width // channels, triton.cdiv(num_sequences, SEQUENCES))](
        x, y, x.stride(0), inputs_ring, states, state_slot, first_token, context_tokens, weight, bias, input_gate,
        recurrence_gate, input_gate_bias, recurrence_gate_bias, decay, out, width, num_sequences,
        TAPS=weight.shape[1], BLOCK_WIDTH=input_gate.shape[1], SEQUENCES=SEQUENCES, CHANNELS=channels, COLS=cols,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    sizes = tuned("rg_lru_step", arch)
    yield Specialisation(
        op="rg_lru_step",
        kernel=rg_lru_step_kernel,
        types={
            **dict.fromkeys(("x", "y", "inputs_ring", "input_gate", "recurrence_gate", "out"), "*bf16"),
            **dict.fromkeys(("weight", "bias", "input_gate_bias", "recurrence_gate_bias", "decay", "states"), "*fp32"),
            **dict.fromkeys(("state_slot", "first_token", "context_tokens"), "*i32"),
            **dict.fromkeys(("row_stride", "width", "num_sequences"), "i32"),
        },
        constants={
            **{"TAPS": CONV_TAPS, "BLOCK_WIDTH": GATE_BLOCK_WIDTH, "SEQUENCES": SEQUENCES},
            **sizes.constants,
        },
        divisible=frozenset({"row_stride", "width"}),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
