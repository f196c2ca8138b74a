"""The recurrence, its gates and the kernel of a decode step, in Triton's interpreter, against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma2_fast.triton_kernels.conv1d import conv1d
from gemma2_fast.triton_kernels.rg_lru import rg_lru_gates, rg_lru_scan
from gemma2_fast.triton_kernels.rg_lru_step import rg_lru_step
from tests.support.closeness import assert_close, assert_rejected
from tests.triton_kernels.recurrent_batch import Layer, RecurrentBatch

# The sigmoid of a large negative number divides by infinity, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

OPEN = 1e9  # the sigmoid of it is 1
DECAY = torch.tensor([math.log(math.expm1(-math.log(0.6) / 8))])  # of which an open gate leaves 0.6
CHUNK = 16
# Of a chunk one token less, as many and one more; a few that reach back into the ring; none.
RAGGED = [(0, CHUNK), (40, CHUNK + 1), (7, 0), (2, CHUNK - 1), (0, 1), (1, 2 * CHUNK + 3)]
# More sequences than a program has, at every row of the ring; some have no token.
SINGLE = [(position, int(position not in (3, 8))) for position in range(21)]

Run = Callable[[RecurrentBatch, Tensor, Tensor], Tensor]


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def prefill(batch: RecurrentBatch, ring: Tensor, states: Tensor) -> Tensor:
    """out [T, R]; ring and states updated."""
    layer, rows = batch.layer, batch.rows().to(ring.dtype)
    x, y = rows.split(layer.width, dim=1)
    conv, gates = torch.full_like(x, math.nan, memory_format=torch.contiguous_format), nan(2, *x.shape)
    conv1d(
        x, ring, batch.state_slot, batch.token_sequence, batch.positions, batch.context_tokens, layer.conv,
        layer.conv_bias, conv, block=16,
    )  # fmt: skip
    rg_lru_gates(
        conv, layer.input_gate.to(conv.dtype), layer.recurrence_gate.to(conv.dtype), layer.input_gate_bias,
        layer.recurrence_gate_bias, gates, tile_tokens=16, tile_channels=16, cols=16,
    )  # fmt: skip
    out = torch.full_like(conv, math.nan)
    rg_lru_scan(
        conv, gates, x, y, layer.decay, states, ring, batch.state_slot, batch.first_token, batch.context_tokens, out,
        channels=16, chunk=CHUNK,
    )  # fmt: skip
    return out


def step(batch: RecurrentBatch, ring: Tensor, states: Tensor) -> Tensor:
    """As `prefill`, of at most one new token a sequence."""
    layer, rows = batch.layer, batch.rows().to(ring.dtype)
    x, y = rows.split(layer.width, dim=1)
    out = torch.full_like(x, math.nan, memory_format=torch.contiguous_format)
    rg_lru_step(
        x, y, ring, states, batch.state_slot, batch.first_token, batch.context_tokens, layer.conv, layer.conv_bias,
        layer.input_gate.to(x.dtype), layer.recurrence_gate.to(x.dtype), layer.input_gate_bias,
        layer.recurrence_gate_bias, layer.decay, out, channels=16, cols=16,
    )  # fmt: skip
    return out


def assert_right(run: Run, batch: RecurrentBatch) -> None:
    """Rows, states and ring; slots of no sequence keep what they held."""
    ring, states = batch.ring(), batch.states()
    out = run(batch, ring, states)
    (exact, exact_states), (usual, usual_states) = (batch.reference(dtype) for dtype in (torch.float64, torch.float32))
    assert_close("rg_lru", out, exact, usual)
    used = [slot for slot, (context, new) in zip(batch.slots, batch.lengths, strict=True) if context + new]
    of_used = [s for s, (context, new) in enumerate(batch.lengths) if context + new]
    assert_close("rg_lru", states[used], exact_states[of_used], usual_states[of_used])
    assert np.isnan(np.delete(states.numpy(), used, axis=0)).all()
    torch.testing.assert_close(ring, batch.ring_afterwards(), rtol=0, atol=0, equal_nan=True)


def test_gates_by_hand() -> None:
    """(block, in, out): the input gate takes the channel before from its own block, the other one its double."""
    eye = torch.eye(16)
    conv = torch.arange(3 * 32, dtype=torch.float32).view(3, 32)
    gates = nan(2, 3, 32)
    rg_lru_gates(
        conv, eye.roll(1, 1).repeat(2, 1, 1), 2 * eye.repeat(2, 1, 1), torch.zeros(32), torch.full((32,), 0.5), gates,
        tile_tokens=16, tile_channels=16, cols=16,
    )  # fmt: skip
    torch.testing.assert_close(gates[0], conv.view(3, 2, 16).roll(1, 2).view(3, 32), rtol=0, atol=0)
    torch.testing.assert_close(gates[1], 2 * conv + 0.5, rtol=0, atol=0)


def scan(
    conv: list[float], gates: tuple[float, float], context: int, state: float, decay: Tensor = DECAY
) -> tuple[Tensor, Tensor]:
    """h [T, R] of one sequence and the state [R] afterwards, with the same numbers in every channel but the decay."""
    tokens, width = len(conv), len(decay)
    values = torch.tensor(conv, dtype=torch.float32)[:, None].repeat(1, width)
    twenties = torch.full_like(values, 20.0)  # gelu(20) = 20
    states, out = torch.full((1, width), state, dtype=torch.float32), nan(tokens, width)
    rg_lru_scan(
        values, torch.tensor(gates)[:, None, None].repeat(1, tokens, width), values, twenties, decay, states,
        torch.zeros(1, 4, width), torch.zeros(1, dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32),
        torch.tensor([context], dtype=torch.int32), out, channels=width, chunk=2,
    )  # fmt: skip
    return out / 20, states[0]


def test_by_hand() -> None:
    """Open gates: h = 0.6 h + 0.8 x, and h = x at position 0, whatever the state was."""
    rows, state = scan([5, 10, 1], (OPEN, OPEN), 0, math.nan)
    np.testing.assert_allclose(rows.flatten(), [5, 11, 7.4], rtol=1e-6)
    assert float(state) == pytest.approx(7.4)
    rows, _ = scan([10], (OPEN, OPEN), 1, 5)
    np.testing.assert_allclose(rows.flatten(), [11], rtol=1e-6)


def test_closed_gates() -> None:
    """A closed input gate lets nothing in; a closed recurrence gate keeps every bit of the state and adds nothing."""
    rows, _ = scan([7, 7], (-OPEN, OPEN), 3, 10)
    np.testing.assert_allclose(rows.flatten(), [6, 3.6], rtol=1e-6)
    _, state = scan([7, 7, 7], (OPEN, -OPEN), 3, 1 + 2**-20)
    assert float(state) == 1 + 2**-20


def test_damping_to_a_few_roundings() -> None:
    """sqrt(1 - a^2), which is what one token leaves of 1, from states that hardly decay to those that do at once.

    With a decay of -16, 1 - a^2 is 2e-6, and half of its digits are lost where 1 + e^decay or a^2 is rounded first.
    """
    decay = torch.linspace(-16, 4, 512)
    _, state = scan([1], (OPEN, OPEN), 1, 0, decay)
    a_squared_log = -2 * 8 * np.log1p(np.exp(decay.double().numpy()))
    np.testing.assert_allclose(state, np.sqrt(-np.expm1(a_squared_log)), rtol=5 * 2.0**-24)


@pytest.mark.parametrize(("num_blocks", "block_width"), [(2, 16), (1, 32)])
@pytest.mark.parametrize(("run", "lengths"), [(prefill, RAGGED), (step, SINGLE)])
def test_ragged_batches(run: Run, lengths: list[tuple[int, int]], num_blocks: int, block_width: int) -> None:
    assert_right(run, RecurrentBatch.make(Layer.make(num_blocks, block_width), lengths))


@pytest.mark.parametrize("run", [prefill, step])
@pytest.mark.parametrize("decay", [-15.0, -6.9, 0.0, 3.0, 30.0])
def test_decays(run: Run, decay: float) -> None:
    """From states that keep all but 5e-6 of their logarithm at a token, to those that keep nothing."""
    layer = Layer.make()
    batch = RecurrentBatch.make(replace(layer, decay=torch.full((layer.width,), decay)), SINGLE[:3])
    assert_right(run, batch)


def test_steps_are_a_prefill() -> None:
    """One token after another, sequences ending one by one."""
    batch = RecurrentBatch.make(Layer.make(), [(0, 40), (3, 23), (30, 0), (0, 1)])
    ring, states = batch.ring(), batch.states()
    rows: list[list[Tensor]] = [[] for _ in batch.lengths]
    for index in range(40):
        part = batch.part(index, index + 1)
        out = step(part, ring, states)
        for s, row in zip(part.token_sequence.tolist(), out, strict=True):
            rows[s].append(row)
    stepped = torch.cat([torch.stack(of_sequence) for of_sequence in rows if of_sequence])
    whole_ring, whole_states = batch.ring(), batch.states()
    whole = prefill(batch, whole_ring, whole_states)
    exact, usual = batch.reference(torch.float64)[0], batch.reference(torch.float32)[0]
    assert_close("rg_lru", stepped, exact, usual)
    assert_close("rg_lru", whole, exact, usual)
    torch.testing.assert_close(states, whole_states, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ring, whole_ring, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cut", [1, 2, 3, CHUNK])
def test_prefill_in_two_calls(cut: int) -> None:
    """The second call finds its earlier inputs in the ring, all, some or none of them from the first."""
    batch = RecurrentBatch.make(Layer.make(), [(0, 20), (9, 19), (0, 2)])
    ring, states = batch.ring(), batch.states()
    first, second = (prefill(batch.part(*span), ring, states) for span in ((0, cut), (cut, 20)))
    exact, usual = batch.reference(torch.float64), batch.reference(torch.float32)
    counts = [(min(cut, new), new - min(cut, new)) for _, new in batch.lengths]
    pieces = zip(*(part.split([c[i] for c in counts]) for i, part in enumerate((first, second))), strict=True)
    whole = torch.cat([torch.cat(pair) for pair in pieces])
    assert_close("rg_lru", whole, exact[0], usual[0])
    assert_close("rg_lru", states[list(batch.slots)], exact[1], usual[1])
    torch.testing.assert_close(ring, batch.ring_afterwards(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("run", "lengths"), [(prefill, RAGGED[3:]), (step, SINGLE[:8])])
def test_slots_and_neighbours_change_nothing(run: Run, lengths: list[tuple[int, int]]) -> None:
    """Bit for bit: other slots, and the first two sequences alone."""
    batch = RecurrentBatch.make(Layer.make(), lengths)
    out = run(batch, batch.ring(), batch.states())
    moved = replace(batch, slots=batch.slots[1:] + batch.slots[:1])
    torch.testing.assert_close(run(moved, moved.ring(), moved.states()), out, rtol=0, atol=0)
    two = replace(
        batch, lengths=batch.lengths[:2], inputs=batch.inputs[:2], branch=batch.branch[:2], slots=batch.slots[:2]
    )
    alone = run(two, batch.ring(), batch.states())
    torch.testing.assert_close(alone, out[: len(alone)], rtol=0, atol=0)


@pytest.mark.parametrize("run", [prefill, step])
def test_sequences_that_fill_up_a_batch(run: Run) -> None:
    """They have no token, and name a slot that is another's."""
    batch = RecurrentBatch.make(Layer.make(), [(5, 1), (0, 1), (9, 0), (0, 0)])
    ring, states = batch.ring(), batch.states()
    out = run(replace(batch, slots=(*batch.slots[:2], *batch.slots[:2])), ring, states)
    expected_ring, expected_states = batch.ring(), batch.states()
    torch.testing.assert_close(out, run(batch, expected_ring, expected_states), rtol=0, atol=0)
    torch.testing.assert_close(ring, expected_ring, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(states, expected_states, rtol=0, atol=0, equal_nan=True)


def test_both_round_the_convolution_alike() -> None:
    """Stored in 16 bits. Of bfloat16 the interpreter's own conversion is wrong."""
    batch = RecurrentBatch.make(Layer.make(), SINGLE[:6])
    states, stepped = batch.states(), batch.states()
    out = prefill(batch, batch.ring().half(), states)
    torch.testing.assert_close(step(batch, batch.ring().half(), stepped), out, rtol=2.0**-10, atol=2.0**-14)
    torch.testing.assert_close(stepped, states, rtol=1e-5, atol=1e-5, equal_nan=True)
    exact = batch.reference(torch.float64)[0]
    assert (out - exact).abs().max() < 0.01 * exact.abs().max()


def mutants(batch: RecurrentBatch) -> list[RecurrentBatch]:
    """Gates swapped, transposed, of the other block; taps reversed; a decay too slow or of the other sign; no state, or
    another sequence's."""
    layer = batch.layer
    layers = [
        replace(layer, input_gate=layer.recurrence_gate, recurrence_gate=layer.input_gate),
        replace(layer, input_gate=layer.input_gate.transpose(1, 2)),
        replace(layer, recurrence_gate=layer.recurrence_gate.transpose(1, 2)),
        replace(layer, recurrence_gate=layer.recurrence_gate.flip(0)),
        replace(layer, conv=layer.conv.flip(1)),
        replace(layer, decay=torch.expm1(layer.decay.exp().log1p() / 8).log()),
        replace(layer, decay=-layer.decay),
    ]
    states = [tuple(torch.zeros_like(state) for state in batch.state), batch.state[1:] + batch.state[:1]]
    return [replace(batch, layer=wrong) for wrong in layers] + [replace(batch, state=wrong) for wrong in states]


@pytest.mark.parametrize(("run", "lengths"), [(prefill, RAGGED), (step, SINGLE)])
def test_mutants_are_rejected(run: Run, lengths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    batch = RecurrentBatch.make(Layer.make(), lengths)
    exact, usual = batch.reference(torch.float64)[0], batch.reference(torch.float32)[0]
    assert_close("rg_lru", run(batch, batch.ring(), batch.states()), exact, usual)
    for mutant in mutants(batch):
        assert_rejected("rg_lru", mutant.reference(torch.float64)[0], exact, usual)
    assert_rejected("rg_lru", batch.reference(torch.float64, resets=False)[0], exact, usual)
    monkeypatch.setattr("gemma2_fast.reference.rg_lru.damping", torch.ones_like)
    assert_rejected("rg_lru", batch.reference(torch.float64)[0], exact, usual)


@pytest.mark.parametrize("run", [prefill, step])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_ring_off_by_one_is_rejected(run: Run, axis: int) -> None:
    """By a row, and by a slot; each sequence reads three earlier inputs there."""
    batch = RecurrentBatch.make(Layer.make(), [(position, 1) for position in range(4, 10)])
    exact, usual = batch.reference(torch.float64)[0], batch.reference(torch.float32)[0]
    wrong = run(batch, batch.ring().roll(1, axis).nan_to_num(), batch.states())
    assert_rejected("rg_lru", wrong, exact, usual)


def test_an_early_state_is_felt_after_a_whole_prefill() -> None:
    """Forty tokens and three chunks on, so that a state lost between chunks shows."""
    batch = RecurrentBatch.make(Layer.make(), [(5, 3 * CHUNK)])
    exact, usual = batch.reference(torch.float64)[0], batch.reference(torch.float32)[0]
    lost = replace(batch, state=(torch.zeros_like(batch.state[0]),)).reference(torch.float64)[0]
    assert_rejected("rg_lru", lost[-4:], exact[-4:], usual[-4:])
