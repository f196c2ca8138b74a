"""The short causal convolution of recurrent layers, and the ring of a sequence's last inputs that it reads.

The input of position p stands in row p % TAPS of the ring. A convolution reaches back TAPS - 1 tokens, so the row of a
token's own input is one that none of its readers wants: it may be written while they still read the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.specialisation import Specialisation

CONV_TAPS = 4  # of every RecurrentGemma


@triton.jit
def convolved(
    x_row, row_stride, ring, width, position, tokens_before, column, present, weight, bias, TAPS: tl.constexpr
):
    """bias[c] + sum over b of weight[c, TAPS - 1 - b] * x of b tokens ago, for b <= position, float32.

    x_row: the token's own row, with those of `tokens_before` tokens of its sequence above it; ring: [TAPS, R] of the
    sequence. These and position are numbers, or columns [tokens, 1]; column [C]; present: which of the result exist.
    """
    tap = tl.arange(0, TAPS)
    of_column = column < width
    # Sixteen bytes a channel at once: tap by tap, each load would touch as many cache lines as it has threads.
    weights = tl.load(weight + column[:, None] * TAPS + tap[None, :], mask=of_column[:, None], other=0.0)
    sums = tl.load(bias + column, mask=of_column, other=0.0)
    for back in tl.static_range(TAPS):
        row = tl.where(tokens_before >= back, x_row - back * row_stride, ring + (position - back) % TAPS * width)
        reached = tl.where(position >= back, present, False)  # `&` of a number and a block is none when interpreted
        values = tl.load(row + column, mask=reached, other=0.0).to(tl.float32)
        sums += values * tl.sum(tl.where(tap == TAPS - 1 - back, weights, 0.0), 1)
    return sums


@triton.jit
def conv1d_kernel(
    x, row_stride, inputs_ring, state_slot, token_sequence, positions, context_tokens, weight, bias, out, width,
    TAPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t, r] = bias[r] + sum over b of weight[r, TAPS - 1 - b] * x[t - b, r], b from 0 to TAPS - 1.

    x: rows of R = width, row_stride apart; earlier inputs that are not among them come from inputs_ring [slots, TAPS,
    R], and there are none before position 0. state_slot, context_tokens [S]; token_sequence, positions [T]; weight [R,
    TAPS], bias [R] float32; out [T, R]. Computed in float32 and rounded once. Grid: (T, R / BLOCK, rounded up).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    sequence = tl.load(token_sequence + token)
    position = tl.load(positions + token)
    sums = convolved(
        x + token * row_stride, row_stride, inputs_ring + tl.load(state_slot + sequence).to(tl.int64) * TAPS * width,
        width, position, position - tl.load(context_tokens + sequence), column, inside, weight, bias, TAPS,
    )  # fmt: skip
    tl.store(out + token * width + column, sums.to(out.dtype.element_ty), mask=inside)


def conv1d(
    x: Any, inputs_ring: Any, state_slot: Any, token_sequence: Any, positions: Any, context_tokens: Any, weight: Any,
    bias: Any, out: Any, *, block: int = 512, num_warps: int = 4,
) -> None:  # fmt: skip
    """x, out [T, R], tokens of x may lie apart; inputs_ring [slots, TAPS, R]; state_slot, context_tokens [S],
    token_sequence and positions [T] int32; weight [R, TAPS] and bias [R] float32."""
    tokens, width = out.shape
    conv1d_kernel[(tokens, triton.cdiv(width, block))](
        x, x.stride(0), inputs_ring, state_slot, token_sequence, positions, context_tokens, weight, bias, out, width,
        TAPS=weight.shape[1], BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    yield Specialisation(
        op="conv1d",
        kernel=conv1d_kernel,
        types={
            **dict.fromkeys(("x", "inputs_ring", "out"), "*bf16"),
            **dict.fromkeys(("state_slot", "token_sequence", "positions", "context_tokens"), "*i32"),
            **dict.fromkeys(("weight", "bias"), "*fp32"),
            **dict.fromkeys(("row_stride", "width"), "i32"),
        },
        constants={"TAPS": CONV_TAPS, "BLOCK": 512},
        divisible=frozenset({"row_stride", "width"}),
    )
