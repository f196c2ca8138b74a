"""RecurrentGemma on the imagined GPU: states that go on from step to step, and begin anew with every sequence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2_fast.reference.model import ReferenceModel
from tests.cuda.fake_gpu import FakeGpu, teach_bfloat16
from tests.cuda.loop import Loop
from tests.cuda.models import SmallModel, gpu_step, small_kernels, small_plan, small_recurrent_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of the gate of a large negative number
]

STEP_DIFFERENCE = 0.02  # of log-probabilities


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16(monkeypatch)


@pytest.fixture(scope="module")
def model() -> SmallModel:
    return small_recurrent_model()


def ids(count: int, seed: int = 0) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(3, 500, count - 1).tolist()]


def test_logits_and_tokens_are_those_of_the_reference(model: SmallModel, driver_library: Path) -> None:
    """A prompt in two chunks, then steps, one of them in a slot that another sequence had."""
    gpu, plan = FakeGpu(driver_library, small_kernels(model.spec)), small_plan(model.spec, max_sequences=1)
    prompt = ids(24)
    with Loop(gpu_step(gpu, model, plan), model, plan) as loop:
        loop.tokens(loop.submit(ids(3, seed=1), max_tokens=1))
        logits = loop.logits(prompt)
        events = loop.finish(loop.submit(prompt, max_tokens=4, logprobs=True))
        tokens = [event.token_id for event in events if event.token_id is not None]
        at_once = loop.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
    run = {gpu.specialisations[launch.symbol].op for launch in gpu.launches}
    assert {"conv1d", "rg_lru_gates", "rg_lru_scan", "rg_lru_step"} <= run
    # Steps and a prompt take other kernels, which round alike.
    stepwise = [event.logprob.logprob for event in events if event.logprob is not None]
    normalised = at_once - np.log(np.exp(at_once).sum(-1, keepdims=True))
    np.testing.assert_allclose(stepwise, normalised[range(len(tokens)), tokens], atol=STEP_DIFFERENCE)
    whole = prompt + tokens[:-1]
    exact, usual = (
        ReferenceModel(model.spec, model.weights, dtype).logits(whole).double().numpy()
        for dtype in (torch.float64, torch.bfloat16)
    )
    error = np.abs(usual - exact).max()
    assert np.abs(logits - exact[: len(prompt)]).max() <= 1.2 * error
    for position, token in zip(range(len(prompt) - 1, len(whole)), tokens, strict=True):
        assert exact[position].max() - exact[position, token] <= 2 * error
    other = ReferenceModel(model.spec, model.weights, torch.float64).logits([5, *whole[1:]]).numpy()
    assert np.abs(other - exact)[len(prompt) - 1 :].max() > 4 * error  # the first token is still felt at the end


def test_a_decode_step_is_seven_kernels_a_recurrent_layer(model: SmallModel, driver_library: Path) -> None:
    gpu = FakeGpu(driver_library, small_kernels(model.spec), computes=False)
    plan = small_plan(model.spec)
    with Loop(gpu_step(gpu, model, plan), model, plan) as loop:
        loop.events(loop.submit([2], max_tokens=1))
    ops = [gpu.specialisations[launch.symbol].op for launch in gpu.launches]
    layer = ["matmul", "rg_lru_step", "matmul", "rms_norm_add", "matmul", "matmul", "rms_norm_add"]
    assert ops[2:16] == 2 * layer
