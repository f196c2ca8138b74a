"""The recurrent layer's kernels at the sizes of RecurrentGemma, against float64."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from gemma2_fast.triton_kernels.conv1d import conv1d
from gemma2_fast.triton_kernels.rg_lru import rg_lru_gates, rg_lru_scan
from gemma2_fast.triton_kernels.rg_lru_step import rg_lru_step
from tests.gpu.places import CARD, Place, cases
from tests.triton_kernels.recurrent_batch import Layer, RecurrentBatch

# The sigmoid of a large negative number divides by infinity, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

Record = TypeVar("Record", Layer, RecurrentBatch)

LAYERS = {"RecurrentGemma 2B": (10, 256), "RecurrentGemma 9B": (16, 256)}  # blocks of the gates, their width
SMALL_LAYER = {"small": (2, 16)}
# Tokens before the step, and new ones: a new prompt, chunks of others, one and two tokens.
PROMPTS = [(0, 300), (2048, 129), (7, 1), (1, 2), (0, 64)]
SMALL_PROMPTS = [(0, 20), (40, 9), (7, 1), (1, 2), (0, 16)]
SINGLE = [(position, 1) for position in (0, 1, 2, 3, 4, 5, 300, 0, 2049, 17, 30_000)]
STEPS = 12
# Root mean square of the error over that of the result. Inputs and weights are rounded before; bfloat16 then rounds the
# convolution's result, which the gates see, and the layer's.
BOUNDS = {torch.bfloat16: 6e-3, torch.float32: 1e-5}
MUTANT_MARGIN = 5


def rounded(record: Record, dtype: torch.dtype) -> Record:
    """Its float32 tensors, and those in its tuples, as the dtype holds them."""

    def of(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(of(part) for part in value)
        return value.to(dtype).float() if isinstance(value, Tensor) else value

    return replace(record, **{field.name: of(getattr(record, field.name)) for field in fields(record)})


def drawn(place: Place, size: tuple[int, int], lengths: list[tuple[int, int]]) -> RecurrentBatch:
    """Its gates' matrices, inputs, branches and ring are what the dtype holds; all else is float32 anyway."""
    layer = Layer.make(*size)
    kept = rounded(layer, place.dtype)
    layer = replace(layer, input_gate=kept.input_gate, recurrence_gate=kept.recurrence_gate)
    batch = RecurrentBatch.make(layer, lengths)
    kept_batch = rounded(batch, place.dtype)
    return replace(batch, inputs=kept_batch.inputs, branch=kept_batch.branch)


class Memory:
    """The batch where the kernels run. Ring and states are written to."""

    def __init__(self, place: Place, batch: RecurrentBatch) -> None:
        def wide(values: Tensor) -> Tensor:
            return values.to(place.device)

        def narrow(values: Tensor) -> Tensor:
            return values.to(place.device, place.dtype)

        layer = batch.layer
        self.x, self.y = narrow(batch.rows()).split(layer.width, dim=1)
        self.ring, self.states = narrow(batch.ring()), wide(batch.states())
        self.conv, self.conv_bias, self.decay = wide(layer.conv), wide(layer.conv_bias), wide(layer.decay)
        self.gates = narrow(layer.input_gate), narrow(layer.recurrence_gate)
        self.gate_biases = wide(layer.input_gate_bias), wide(layer.recurrence_gate_bias)
        self.of_sequences = wide(batch.state_slot), wide(batch.first_token), wide(batch.context_tokens)
        self.of_tokens = wide(batch.token_sequence), wide(batch.positions)
        self.out = place.nothing(*self.x.shape)


def prefill(place: Place, memory: Memory) -> Tensor:
    slots, first_token, context_tokens = memory.of_sequences
    convolved = place.nothing(*memory.x.shape)
    gates = place.nothing(2, *memory.x.shape, dtype=torch.float32)
    conv1d(memory.x, memory.ring, slots, *memory.of_tokens, context_tokens, memory.conv, memory.conv_bias, convolved)
    rg_lru_gates(convolved, *memory.gates, *memory.gate_biases, gates, **place.sizes("rg_lru_gates"))
    rg_lru_scan(
        convolved, gates, memory.x, memory.y, memory.decay, memory.states, memory.ring, slots, first_token,
        context_tokens, memory.out, **scan_sizes(place),
    )  # fmt: skip
    return memory.out


def scan_sizes(place: Place) -> dict[str, int]:
    sizes = place.sizes("rg_lru_scan")
    return {("stages" if name == "num_stages" else name): size for name, size in sizes.items()}


def step(place: Place, memory: Memory) -> Tensor:
    rg_lru_step(
        memory.x, memory.y, memory.ring, memory.states, *memory.of_sequences, memory.conv, memory.conv_bias,
        *memory.gates, *memory.gate_biases, memory.decay, memory.out, **place.sizes("rg_lru_step"),
    )  # fmt: skip
    return memory.out


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return float((actual.double().cpu() - exact).norm() / exact.norm())


def assert_right(place: Place, batch: RecurrentBatch, memory: Memory, out: Tensor) -> None:
    """Rows, states and ring; slots of no sequence keep what they held."""
    exact, exact_states = batch.reference(torch.float64)
    bound, slots = BOUNDS[place.dtype], list(batch.slots)
    assert relative_error(out, exact) <= bound
    states = memory.states.cpu()
    assert relative_error(states[slots], exact_states) <= bound
    assert states.isnan().all(1).sum() == len(states) - len(slots)
    torch.testing.assert_close(memory.ring.float().cpu(), batch.ring_afterwards(), rtol=0, atol=0, equal_nan=True)
    for mutant in mutants(batch):
        assert relative_error(mutant, exact) > MUTANT_MARGIN * bound


def mutants(batch: RecurrentBatch) -> list[Tensor]:
    """Gates swapped, a gate transposed, taps reversed, no state."""
    layer = batch.layer
    layers = [
        replace(layer, input_gate=layer.recurrence_gate, recurrence_gate=layer.input_gate),
        replace(layer, recurrence_gate=layer.recurrence_gate.transpose(1, 2)),
        replace(layer, conv=layer.conv.flip(1)),
    ]
    wrong = [replace(batch, layer=other) for other in layers]
    wrong.append(replace(batch, state=tuple(torch.zeros_like(state) for state in batch.state)))
    return [each.reference(torch.float64)[0] for each in wrong]


def prompts(place: Place) -> list[tuple[int, int]]:
    return PROMPTS if place is CARD else SMALL_PROMPTS


@pytest.mark.parametrize(("place", "size"), cases(LAYERS, SMALL_LAYER))
def test_prompts(place: Place, size: tuple[int, int]) -> None:
    batch = drawn(place, size, prompts(place))
    memory = Memory(place, batch)
    assert_right(place, batch, memory, prefill(place, memory))


@pytest.mark.parametrize(("place", "size"), cases(LAYERS, SMALL_LAYER))
def test_a_decode_step(place: Place, size: tuple[int, int]) -> None:
    batch = drawn(place, size, SINGLE)
    memory = Memory(place, batch)
    assert_right(place, batch, memory, step(place, memory))


@pytest.mark.parametrize(("place", "size"), cases(LAYERS, SMALL_LAYER))
def test_decode_steps_go_on_from_prompts(place: Place, size: tuple[int, int]) -> None:
    """A prompt of one token, and one token after another."""
    lengths = [(0, 20 + STEPS), (9, 5 + STEPS), (0, 1 + STEPS)]
    batch = drawn(place, size, lengths)
    memory, rows = Memory(place, batch.part(0, 1)), []
    rows.append(prefill(place, memory))
    for index in range(1, 20 + STEPS):
        part = batch.part(index, index + 1)
        after = Memory(place, part)
        after.ring, after.states = memory.ring, memory.states
        rows.append(step(place, after))
    exact, exact_states = batch.reference(torch.float64)
    of_sequences = exact.split([new for _, new in lengths])
    for index, out in enumerate(rows):
        expected = torch.stack([row[index] for row in of_sequences if index < len(row)])
        assert relative_error(out, expected) <= 2 * BOUNDS[place.dtype]
    assert relative_error(memory.states[list(batch.slots)], exact_states) <= BOUNDS[place.dtype]
