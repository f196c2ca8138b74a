"""The real-gated linear recurrence over many tokens: the gates of all of them, then a walk along each sequence.

A chunk of a walk is scanned and not looped over: of a few channels a program would have one token under way at a time,
and the walk is as long as a prompt. Loads of a chunk wait for none before it, only its last addition does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.conv1d import CONV_TAPS
from gemma2_fast.triton_kernels.numerics import gelu_tanh
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import tuned

DECAY_SHARPNESS = tl.constexpr(8.0)
GATE_BLOCK_WIDTH = 256  # of every RecurrentGemma


@triton.jit
def _one_minus_exp(x):
    """1 - e^-x for x >= 0; near 0 by its series, up to a term that is below half a rounding."""
    series = x * (1.0 - x * (0.5 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x * (1 / 720))))))
    return tl.where(x < 0.25, series, 1.0 - tl.exp(-x))


@triton.jit
def rate_of(decay):
    """8 softplus(decay): what an open recurrence gate takes from the state's logarithm at each token."""
    small = tl.exp(-tl.abs(decay))
    above_one = 1.0 + small
    # What the sum rounds away of a small number is made up for: the state may keep 0.999 of itself.
    rest = tl.where(above_one == 1.0, small, tl.log(above_one) * small / tl.maximum(above_one - 1.0, 2.0**-24))
    return (tl.maximum(decay, 0.0) + rest) * DECAY_SHARPNESS


@triton.jit
def gated(x, input_gate, recurrence_gate, rate, starts):
    """a and b of the recurrence h = a * h of the token before + b, from gates before their sigmoids.

    a = exp(-rate * sigmoid(recurrence_gate)), b = sqrt(1 - a^2) * sigmoid(input_gate) * x. Where a sequence starts the
    h before is zero and b is not damped.
    """
    fall = rate * tl.sigmoid(recurrence_gate)
    damping = tl.where(starts, 1.0, tl.sqrt(_one_minus_exp(2.0 * fall)))
    return tl.exp(-fall), damping * tl.sigmoid(input_gate) * x


@triton.jit
def add_gates(
    input_sums, recurrence_sums, values, row, channel, input_gate, recurrence_gate, BLOCK_WIDTH: tl.constexpr
):
    """Adds the part of both gates [tokens, channel] that comes from the block's inputs `row`: values [tokens, row].

    input_gate, recurrence_gate [blocks, W, W] as (block, in, out), so a row of W numbers for every input.
    """
    places = row[:, None] * BLOCK_WIDTH + channel[None, :] % BLOCK_WIDTH
    input_sums = tl.dot(values, tl.load(input_gate + places), input_sums)
    recurrence_sums = tl.dot(values, tl.load(recurrence_gate + places), recurrence_sums)
    return input_sums, recurrence_sums


@triton.jit
def rg_lru_gates_kernel(
    conv, input_gate, recurrence_gate, input_gate_bias, recurrence_gate_bias, gates, width, num_tokens,
    BLOCK_WIDTH: tl.constexpr, TILE_TOKENS: tl.constexpr, TILE_CHANNELS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """gates[g, t, b, j] = bias_g[b, j] + sum over i of conv[t, b, i] * weight_g[b, i, j], before the sigmoids.

    conv [T, R], T = num_tokens, R = width; weights input_gate (g = 0) and recurrence_gate (1) [blocks, W, W] as (block,
    in, out), W = BLOCK_WIDTH; biases [R] float32; gates [2, T, R] float32. TILE_CHANNELS and COLS, inputs at a time,
    divide W. Grid: (T / TILE_TOKENS, rounded up, R / TILE_CHANNELS).
    """
    tl.static_assert(BLOCK_WIDTH % TILE_CHANNELS == 0, "a tile of channels must lie in one block")
    tl.static_assert(BLOCK_WIDTH % COLS == 0, "a block must be whole steps along its inputs")
    token = tl.program_id(0) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    present = (token < num_tokens)[:, None]
    place = token.to(tl.int64)[:, None] * width
    first_channel = tl.program_id(1) * TILE_CHANNELS
    channel = first_channel + tl.arange(0, TILE_CHANNELS)
    block = first_channel // BLOCK_WIDTH * BLOCK_WIDTH
    input_sums = tl.zeros([TILE_TOKENS, TILE_CHANNELS], tl.float32)
    recurrence_sums = tl.zeros([TILE_TOKENS, TILE_CHANNELS], tl.float32)
    for begin in range(0, BLOCK_WIDTH, COLS):
        row = block + begin + tl.arange(0, COLS)
        values = tl.load(conv + place + row, mask=present, other=0.0)
        input_sums, recurrence_sums = add_gates(
            input_sums, recurrence_sums, values, row, channel, input_gate, recurrence_gate, BLOCK_WIDTH
        )
    out = gates + place + channel
    tl.store(out, input_sums + tl.load(input_gate_bias + channel), mask=present)
    out += tl.cast(num_tokens, tl.int64) * width
    tl.store(out, recurrence_sums + tl.load(recurrence_gate_bias + channel), mask=present)


@triton.jit
def _both(kept, added, next_kept, next_added):
    """Two steps of h = a * h + b as one."""
    return next_kept * kept, next_kept * added + next_added


@triton.jit
def rg_lru_scan_kernel(
    conv, gates, x, y, row_stride, decay, states, inputs_ring, state_slot, first_token, context_tokens, out, width,
    num_tokens,
    TAPS: tl.constexpr, CHANNELS: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[t] = gelu_tanh(y[t]) * h[t]; h[t] = a[t] * h[t - 1] + sqrt(1 - a[t]^2) * sigmoid(gates[0, t]) * conv[t].

    a[t] = exp(-8 * softplus(decay) * sigmoid(gates[1, t])); at position 0 h = sigmoid(gates[0, t]) * conv[t], whatever
    the state holds. conv, out [T, R]; gates [2, T, R] float32; x, y: rows of R, row_stride apart; decay [R] float32;
    states [slots, R] float32 and inputs_ring [slots, TAPS, R], read and left as the next step needs them, by slots
    state_slot [S]; first_token [S + 1]; context_tokens [S]. T = num_tokens; CHANNELS divides R = width; TAPS a power of
    two. A sequence without tokens is left alone. Computed in float32, out rounded once. Grid: (R / CHANNELS, S).
    """
    sequence = tl.program_id(1)
    begin = tl.load(first_token + sequence)
    count = tl.load(first_token + sequence + 1) - begin
    if count == 0:
        return
    context = tl.load(context_tokens + sequence)
    slot = tl.load(state_slot + sequence).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    rate = rate_of(tl.load(decay + channel))[None, :]
    places = states + slot * width + channel
    state = tl.zeros([CHANNELS], tl.float32)
    if context > 0:
        state = tl.load(places)

    row = tl.arange(0, CHUNK)[:, None]
    recurrence_gates = gates + tl.cast(num_tokens, tl.int64) * width
    for first in tl.range(0, count, CHUNK, num_stages=STAGES):
        present = first + row < count
        token = (begin + first + row).to(tl.int64)
        place = token * width + channel
        values = tl.load(conv + place, mask=present, other=0.0).to(tl.float32)
        input_gate = tl.load(gates + place, mask=present, other=0.0)
        recurrence_gate = tl.load(recurrence_gates + place, mask=present, other=0.0)
        branch = tl.load(y + token * row_stride + channel, mask=present, other=0.0).to(tl.float32)
        kept, added = gated(values, input_gate, recurrence_gate, rate, context + first + row == 0)
        kept, added = tl.associative_scan((tl.where(present, kept, 1.0), added), 0, _both)
        rows = kept * state[None, :] + added
        tl.store(out + place, (gelu_tanh(branch) * rows).to(out.dtype.element_ty), mask=present)
        state = tl.sum(tl.where(row == CHUNK - 1, rows, 0.0), 0)  # past the last token rows repeat
    tl.store(places, state)

    last = count - TAPS + tl.arange(0, TAPS)[:, None]
    inputs = tl.load(x + (begin + last).to(tl.int64) * row_stride + channel, mask=last >= 0, other=0.0)
    tl.store(inputs_ring + (slot * TAPS + (context + last) % TAPS) * width + channel, inputs, mask=last >= 0)


def rg_lru_gates(
    conv: Any, input_gate: Any, recurrence_gate: Any, input_gate_bias: Any, recurrence_gate_bias: Any, gates: Any, *,
    tile_tokens: int, tile_channels: int, cols: int, num_warps: int = 4, num_stages: int = 3,
) -> None:  # fmt: skip
    """conv [T, R]; gate weights [blocks, W, W] and biases [R]; gates [2, T, R] float32. Contiguous, on one device."""
    tokens, width = conv.shape
    rg_lru_gates_kernel[(triton.cdiv(tokens, tile_tokens), width // tile_channels)](
        conv, input_gate, recurrence_gate, input_gate_bias, recurrence_gate_bias, gates, width, tokens,
        BLOCK_WIDTH=input_gate.shape[1], TILE_TOKENS=tile_tokens, TILE_CHANNELS=tile_channels, COLS=cols,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def rg_lru_scan(
    conv: Any, gates: Any, x: Any, y: Any, decay: Any, states: Any, inputs_ring: Any, state_slot: Any,
    first_token: Any, context_tokens: Any, out: Any, *, channels: int, chunk: int, stages: int = 2, num_warps: int = 4,
) -> None:  # fmt: skip
    """conv, out [T, R]; gates [2, T, R] float32; x, y [T, R], whose tokens may lie apart; decay [R] float32; states
    [slots, R] float32 and inputs_ring [slots, TAPS, R], updated; state_slot and context_tokens [S], first_token [S + 1]
    int32."""
    tokens, width = out.shape
    rg_lru_scan_kernel[(width // channels, state_slot.shape[0])](
        conv, gates, x, y, x.stride(0), decay, states, inputs_ring, state_slot, first_token, context_tokens, out,
        width, tokens, TAPS=inputs_ring.shape[1], CHANNELS=channels, CHUNK=chunk, STAGES=stages, num_warps=num_warps,
    )  # fmt: skip


def gates_specialisations(arch: int) -> Iterator[Specialisation]:
    sizes = tuned("rg_lru_gates", arch)
    yield Specialisation(
        op="rg_lru_gates",
        kernel=rg_lru_gates_kernel,
        types={
            **dict.fromkeys(("conv", "input_gate", "recurrence_gate"), "*bf16"),
            **dict.fromkeys(("input_gate_bias", "recurrence_gate_bias", "gates"), "*fp32"),
            **dict.fromkeys(("width", "num_tokens"), "i32"),
        },
        constants={"BLOCK_WIDTH": GATE_BLOCK_WIDTH, **sizes.constants},
        divisible=frozenset({"width"}),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )


def scan_specialisations(arch: int) -> Iterator[Specialisation]:
    sizes = tuned("rg_lru_scan", arch)
    yield Specialisation(
        op="rg_lru_scan",
        kernel=rg_lru_scan_kernel,
        types={
            **dict.fromkeys(("conv", "x", "y", "inputs_ring", "out"), "*bf16"),
            **dict.fromkeys(("gates", "decay", "states"), "*fp32"),
            **dict.fromkeys(("state_slot", "first_token", "context_tokens"), "*i32"),
            **dict.fromkeys(("row_stride", "width", "num_tokens"), "i32"),
        },
        constants={"TAPS": CONV_TAPS, "STAGES": sizes.num_stages, **sizes.constants},
        divisible=frozenset({"row_stride", "width"}),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
