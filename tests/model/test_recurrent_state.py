"""The state of recurrent layers: whose it is, when it begins anew, and what happens to text longer than any window."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast import Generator, _core
from gemma2_fast.engine.engine import core_cache_plan, cpu_step
from gemma2_fast.engine.options import EngineOptions, plan_engine
from gemma2_fast.errors import Gemma2FastError, RequestError
from gemma2_fast.quant import FORMATS
from gemma2_fast.reference import ReferenceModel
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.quantize import quantize_weights
from gemma2_fast.weights.tensor import Tensor
from tests.support.checkpoints import generator, quantisable_spec, random_weights
from tests.support.planned_steps import Planner, Sequence, run_of
from tests.support.tiny_models import tiny_model

NEW_TOKENS = 300


@cache
def model(format_name: str = "F32") -> tuple[ModelSpec, dict[str, Tensor]]:
    spec = quantisable_spec("recurrent_gemma")
    return spec, random_weights(spec, format_name)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, 512, length).tolist()


@pytest.fixture
def one_slot() -> Any:
    with generator(*model(), max_batch_size=1, max_step_tokens=16) as gen:
        yield gen


def test_generating_twice(one_slot: Generator) -> None:
    """The second run finds the first one's state in its slot."""
    first = one_slot.generate(prompt(50), max_tokens=20, logprobs=2)
    assert one_slot.generate(prompt(50), max_tokens=20, logprobs=2).logprobs == first.logprobs
    logits = one_slot.logits(prompt(70))
    one_slot.generate(prompt(33, seed=1), max_tokens=5)
    assert np.array_equal(one_slot.logits(prompt(70)), logits)


def test_a_cancelled_sequence_leaves_nothing(one_slot: Generator) -> None:
    expected = one_slot.logits(prompt(40))
    chunks = one_slot.stream(prompt(90, seed=2), max_tokens=100)
    for _ in range(3):
        next(chunks)
    chunks.close()
    assert np.array_equal(one_slot.logits(prompt(40)), expected)


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
def test_steps_of_fewer_tokens_than_the_convolution_has_taps(instruction_set: str) -> None:
    """Eight sequences in three slots, one to three tokens at a time; every other one is given up on its way."""
    spec, weights = model()
    options = EngineOptions(instruction_set=instruction_set, num_threads=2, max_seq_len=64, max_step_tokens=16)
    plan = plan_engine(spec, ("F32",), options)

    def planner() -> Planner:
        step = cpu_step(plan, weights, core_cache_plan(plan.cache))
        step.poison_cache()
        return Planner(run_of(step, spec.vocab_size), plan.cache)

    prompts, whole, pieces = [prompt(13, seed=i) for i in range(8)], planner(), planner()
    expected = [whole.feed(whole.begin(slot=0), ids, 16) for ids in prompts]
    rng, waiting = np.random.default_rng(0), list(range(8))
    running: dict[int, tuple[int, Sequence]] = {}  # slot → prompt and its sequence
    while waiting or running:
        for slot in range(3):
            if slot not in running and waiting:
                running[slot] = waiting.pop(), pieces.begin(slot)
        chosen = [work for work in running.values() if rng.random() < 0.7]
        spans = [(s.num_tokens, min(13, s.num_tokens + int(rng.integers(1, 4)))) for _, s in chosen]
        work = [(s, prompts[i][first:end]) for (i, s), (first, end) in zip(chosen, spans, strict=True)]
        found = pieces.step(*work) if work else []
        for (i, _), (first, end), logits in zip(chosen, spans, found, strict=True):
            assert np.array_equal(logits, expected[i][first:end]), f"tokens {first} to {end} of prompt {i}"
        running = {slot: (i, s) for slot, (i, s) in running.items() if s.num_tokens < (13, 5)[i % 2]}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_batches_of_every_length_are_their_members(backend: str) -> None:
    prompts = [prompt(length, seed=length) for length in (1, 2, 3, 4, 41, 97)]
    with generator(*model(), backend=backend, max_batch_size=6, max_step_tokens=30) as gen:
        together = gen.generate(prompts, max_tokens=30)
        alone = [gen.generate(ids, max_tokens=30) for ids in prompts]
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]


def test_the_reference_writes_the_same(tmp_path: Path) -> None:
    directory = tiny_model("recurrent_gemma", tmp_path).directory
    ids = prompt(60, seed=5)
    found = []
    for backend in ("cpu", "reference"):
        with Generator.from_pretrained(directory, backend=backend, max_batch_size=1, max_step_tokens=64) as gen:
            assert gen.backend == backend
            found.append(list(gen.generate(ids, max_tokens=NEW_TOKENS, ignore_eos=True).token_ids))
    assert len(found[0]) == NEW_TOKENS
    assert len(set(found[0])) >= 30, "a model that repeats itself proves nothing"
    assert found[0] == found[1]


def test_recurrent_layers_alone() -> None:
    """Without attention there are no pages: the cache is the states, and steps are bounded by nothing else."""
    spec = quantisable_spec("recurrent_gemma", _block_types=["recurrent"])
    weights = random_weights(spec, "F32")
    found = []
    for backend in ("cpu", "reference"):
        with generator(spec, weights, backend=backend, max_batch_size=2, max_step_tokens=20) as gen:
            assert gen.plan.cache.num_bytes == 2 * 4 * 256 * 4 * 4  # slots, layers, width, state and three inputs
            found.append([gen.logits(prompt(50)), gen.logits(prompt(1))])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_biases_are_not_rounded_with_the_matrices(tmp_path: Path) -> None:
    """dtype="bfloat16" converts a float32 checkpoint's weights; the gates' biases have two dimensions, but are none."""
    tiny = tiny_model("recurrent_gemma", tmp_path)
    rounded = {
        name: tensor
        if len(tensor.shape) < 2 or name.endswith("_bias")
        else Tensor.from_float32(tensor.to_float32(), FORMATS["BF16"])
        for name, tensor in tiny.weights.items()
    }
    with Generator.from_pretrained(tmp_path, dtype="bfloat16") as gen, generator(tiny.spec, rounded) as expected:
        assert np.array_equal(gen.logits(prompt(30)), expected.logits(prompt(30)))


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_matrices(quantization: str) -> None:
    """Gates, convolutions and biases stay as they are; the logits are near those of the unquantised model."""
    spec, weights = model("BF16")
    quantised = quantize_weights(weights, quantization, num_threads=2, progress=False)
    kept = {name for name, tensor in quantised.items() if tensor.format.name in ("BF16", "F32")}
    assert "layers.0.recurrent.linear_x" not in kept
    assert {"layers.0.recurrent.input_gate", "layers.0.recurrent.conv", "layers.0.recurrent.linear_x_bias"} <= kept
    with generator(spec, weights) as gen:
        exact = gen.logits(prompt(90))
    with generator(spec, quantised) as gen:
        assert gen.plan.activations == "int8"
        error = np.sqrt(np.mean((gen.logits(prompt(90)) - exact) ** 2)) / np.sqrt(np.mean(exact**2))
    assert 1e-4 < error < {"int8": 0.05, "int4": 0.4}[quantization]


def test_text_beyond_the_training(caplog: pytest.LogCaptureFixture) -> None:
    """The model has 512 positions. Its cache does not grow with the text, so more are allowed, and said."""
    spec, weights = model()
    options = {"max_batch_size": 1, "max_step_tokens": 64}
    with caplog.at_level(logging.WARNING), generator(spec, weights, max_seq_len=1500, **options) as gen:
        assert gen.plan.cache.max_seq_len == 1500
        assert len(gen.generate(prompt(900), max_tokens=50, ignore_eos=True).token_ids) == 50
        exact = ReferenceModel(spec, weights, torch.float32).logits(prompt(900)).numpy()
        np.testing.assert_allclose(gen.logits(prompt(900)), exact, rtol=0, atol=1e-3)
        with generator(spec, weights, **options) as short:
            assert gen.plan.cache.num_bytes == short.plan.cache.num_bytes
    assert [record.getMessage() for record in caplog.records] == [
        "max_seq_len 1500 is beyond the 512 tokens of the model's training"
    ]
    with pytest.raises(RequestError, match="more than the model's 512 positions"):
        plan_engine(quantisable_spec("gemma2"), ("F32",), EngineOptions(max_seq_len=1500))


def core_step(plan_change: Callable[[dict[str, Any]], Any] = lambda _: None, **tensors: Any) -> _core.CpuStep:
    """The CPU step of the model with other states or other tensors."""
    spec, weights = model()
    plan = plan_engine(spec, ("F32",), EngineOptions(max_batch_size=2, num_threads=1))
    core = core_cache_plan(plan.cache)
    state = {"layers": [0, 1, 3], "width": 256, "conv_tail": 3, "num_slots": 2}
    plan_change(state)
    recurrent = _core.RecurrentStateGroup(**state) if state else None
    changed = {f"layers.0.recurrent.{name}": tensor for name, tensor in tensors.items()}
    merged = {name: tensor for name, tensor in {**weights, **changed}.items() if tensor is not None}
    return cpu_step(plan, merged, _core.CachePlan(page_tokens=32, paged=core.paged, recurrent=recurrent))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.clear(),
        lambda state: state.update(width=128),
        lambda state: state.update(conv_tail=2),
        lambda state: state.update(layers=[1, 3]),
        lambda state: state.update(num_slots=0),
        lambda state: state.update(num_snapshots=2),
        lambda state: state.update(num_snapshots=-1),
    ],
    ids=[
        "none",
        "another width",
        "another convolution",
        "other layers",
        "no slots",
        "snapshots alone",
        "less than none",
    ],
)
def test_states_that_do_not_fit(change: Callable[[dict[str, Any]], Any]) -> None:
    core_step()
    with pytest.raises(Gemma2FastError, match="layer 0: the cache"):
        core_step(change)


def test_gates_that_cannot_be_used() -> None:
    _, weights = model()
    gate = weights["layers.0.recurrent.input_gate"]
    with pytest.raises(Gemma2FastError, match="input_gate is missing"):
        core_step(input_gate=None)
    with pytest.raises(Gemma2FastError, match="input_gate must not be quantised, it is INT8_G128"):
        core_step(input_gate=Tensor(gate.shape, *_strips(gate)))


def _strips(gate: Tensor) -> Any:
    flat = Tensor.from_float32(gate.to_float32().reshape(-1, gate.shape[-1]))
    strips = quantize_weights({"layers.0.mlp.up": flat}, "int8", num_threads=1, progress=False)["layers.0.mlp.up"]
    return strips.format, strips.data


@pytest.mark.parametrize(("num_slots", "message"), [(0, "0 state slots"), (3, "state slots lie in")], ids=str)
def test_a_loop_with_other_slots(num_slots: int, message: str) -> None:
    """The loop's plan is not the step's: an error for the request, not a write outside the states."""
    step = core_step()
    spec, _ = model()
    paged = core_cache_plan(plan_engine(spec, ("F32",), EngineOptions(max_batch_size=3)).cache).paged
    recurrent = None
    if num_slots:
        recurrent = _core.RecurrentStateGroup(layers=[0, 1, 3], width=256, conv_tail=3, num_slots=num_slots)
    limits = _core.Limits(
        max_running_sequences=3, max_step_tokens=9, max_seq_len=64, max_logits_rows=9, vocab_size=spec.vocab_size
    )
    loop = _core.DecodeLoop(step, _core.CachePlan(page_tokens=32, paged=paged, recurrent=recurrent), limits)
    request = _core.Request(token_ids=[1, 2], sampling=_core.SamplingParams(max_tokens=30))
    lasts = [loop.wait(sequence, 20.0)[-1] for sequence in [loop.submit(request) for _ in range(3)]]
    while not any(last.finish_reason == "error" for last in lasts):
        lasts = [loop.wait(last.sequence_id, 20.0)[-1] for last in lasts]
    loop.close()
    assert any(message in (last.message or "") for last in lasts)
