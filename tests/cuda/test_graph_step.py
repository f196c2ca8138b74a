"""The GPU's step on an imagined GPU: real launches of real kernels, computed by Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.engine import core_cache_plan
from gemma2_fast.reference.model import ReferenceModel
from tests.cuda.fake_gpu import FakeGpu, teach_bfloat16
from tests.cuda.models import gpu_step, small_kernels, small_plan
from tests.support.tiny_models import TinyModel, tiny_model

# gelu(x) of a large negative x divides by infinity, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

Floats = NDArray[np.float32]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16(monkeypatch)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return small_model("gemma2", tmp_path_factory.mktemp("gemma2"))


def small_model(family: str, directory: Path) -> TinyModel:
    return tiny_model(family, directory, dtype="bfloat16", head_dim=16, num_hidden_layers=2)


class Loop:
    """A decode loop over a step on the imagined GPU."""

    def __init__(self, step: _core.ModelStep, model: TinyModel, plan: CachePlan) -> None:
        self.vocab_size = model.spec.vocab_size
        limits = _core.Limits(
            max_running_sequences=plan.max_sequences,
            max_step_tokens=plan.max_step_tokens,
            max_seq_len=plan.max_seq_len,
            max_logits_rows=plan.max_step_tokens,
            vocab_size=self.vocab_size,
            final_softcap=model.spec.final_softcap,
        )
        self.loop = _core.DecodeLoop(step, core_cache_plan(plan), limits)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()

    def logits(self, token_ids: list[int]) -> Floats:
        out = np.full((len(token_ids), self.vocab_size), np.nan, np.float32)
        self.finish([self.submit(token_ids, 0, out)])
        return out

    def submit(self, token_ids: list[int], max_tokens: int, out: Floats | None = None) -> int:
        sampling = _core.SamplingParams(max_tokens=max_tokens)
        return self.loop.submit(_core.Request(token_ids=token_ids, sampling=sampling, logits_out=out, num_logprobs=0))

    def finish(self, sequences: list[int]) -> list[list[_core.TokenEvent]]:
        done = []
        for sequence in sequences:
            events: list[_core.TokenEvent] = []
            while not events or events[-1].finish_reason is None:
                events += self.loop.wait(sequence, 120.0)
            assert events[-1].finish_reason == "length", events[-1].message
            done.append(events)
        return done

    def generate(self, prompts: list[list[int]], max_tokens: int) -> list[list[tuple[int, float]]]:
        """Tokens of each prompt with their log-probabilities."""
        sequences = [self.submit(prompt, max_tokens) for prompt in prompts]
        return [[(e.token_id, e.logprob.logprob) for e in events] for events in self.finish(sequences)]  # type: ignore


def ids(count: int, seed: int = 0) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(3, 500, count - 1).tolist()]


def reference(model: TinyModel, token_ids: list[int], dtype: torch.dtype) -> Floats:
    return ReferenceModel(model.spec, model.weights, dtype).logits(token_ids).float().numpy()


def run_logits(model: TinyModel, library: Path, prompt: list[int], max_step_tokens: int) -> Floats:
    gpu, plan = FakeGpu(library, small_kernels(model.spec)), small_plan(model.spec, max_step_tokens=max_step_tokens)
    with Loop(gpu_step(gpu, model, plan), model, plan) as loop:
        return loop.logits(prompt)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_logits_are_those_of_the_reference(family: str, driver_library: Path, tmp_path: Path) -> None:
    """A prompt in chunks, past the window of nine keys by more than a page of sixteen; both round to bfloat16."""
    model, prompt = small_model(family, tmp_path), ids(43)
    ours = run_logits(model, driver_library, prompt, 16)
    exact = reference(model, prompt, torch.float64)
    usual = np.abs(reference(model, prompt, torch.bfloat16) - exact)
    assert np.abs(ours - exact).max() <= 1.2 * usual.max()
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= np.sqrt(np.mean(usual**2))


@pytest.mark.slow
def test_graphs_give_the_bits_of_single_launches(gemma2: TinyModel, driver_library: Path) -> None:
    """Three sequences, filled up to four, from one new token each to beyond the window."""
    plan, results, calls = small_plan(gemma2.spec, max_step_tokens=16), [], []
    for captures in (True, False):
        gpu = FakeGpu(driver_library, small_kernels(gemma2.spec))
        step = gpu_step(gpu, gemma2, plan, captures)
        with Loop(step, gemma2, plan) as loop:
            results.append(loop.generate([ids(5, 1), ids(3, 2), ids(7, 3)], 6))
            assert step.num_graphs == (1 if captures else 0)
        calls.append(gpu.calls())
    assert results[0] == results[1]
    assert calls[0].count("cuGraphLaunch") == 5
    assert "cuGraphLaunch" not in calls[1]


@pytest.mark.slow
def test_a_batch_gives_the_tokens_of_its_members(gemma2: TinyModel, driver_library: Path) -> None:
    plan = small_plan(gemma2.spec, max_step_tokens=16)
    gpu = FakeGpu(driver_library, small_kernels(gemma2.spec))
    prompts = [ids(5, 1), ids(12, 2)]
    with Loop(gpu_step(gpu, gemma2, plan), gemma2, plan) as loop:
        together = loop.generate(prompts, 8)
        alone = [loop.generate([prompt], 8)[0] for prompt in prompts]
    for ours, single in zip(together, alone, strict=True):
        assert [token for token, _ in ours] == [token for token, _ in single]
        np.testing.assert_allclose([p for _, p in ours], [p for _, p in single], atol=0.05)
