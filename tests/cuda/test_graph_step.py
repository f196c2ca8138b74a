"""The GPU's step on an imagined GPU: real launches of real kernels, computed by Triton's interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast.reference.model import ReferenceModel
from tests.cuda.fake_gpu import FakeGpu, teach_bfloat16
from tests.cuda.loop import Floats, Loop
from tests.cuda.models import gpu_step, small_kernels, small_plan
from tests.support.tiny_models import TinyModel, tiny_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # gelu(x) of a large negative x divides by it
]


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16(monkeypatch)


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return small_model("gemma2", tmp_path_factory.mktemp("gemma2"))


def small_model(family: str, directory: Path) -> TinyModel:
    return tiny_model(family, directory, dtype="bfloat16", head_dim=16, num_hidden_layers=2)


def gpu_loop(model: TinyModel, library: Path, captures: bool = True, **sizes: int) -> tuple[FakeGpu, Loop]:
    gpu, plan = FakeGpu(library, small_kernels(model.spec)), small_plan(model.spec, **sizes)
    return gpu, Loop(gpu_step(gpu, model, plan, captures=captures), model, plan)


def ids(count: int, seed: int = 0) -> list[int]:
    return [2, *np.random.default_rng(seed).integers(3, 500, count - 1).tolist()]


def reference(model: TinyModel, token_ids: list[int], dtype: torch.dtype) -> Floats:
    return ReferenceModel(model.spec, model.weights, dtype).logits(token_ids).float().numpy()


def submit_together(gpu: FakeGpu, loop: Loop, asked: list[dict[str, Any]]) -> list[int]:
    """All in one step from the first on, whatever the loop's thread does in the meantime."""
    with gpu.paused() as reached:
        first = loop.submit([2], max_tokens=1)
        assert reached.wait(60)
        sequences = [loop.submit(**request) for request in asked]
    loop.finish(first)
    return sequences


@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text"])
def test_logits_are_those_of_the_reference(family: str, driver_library: Path, tmp_path: Path) -> None:
    """A prompt in chunks of many tokens and of few, past the window of nine keys by more than a page of sixteen; both
    round to bfloat16."""
    model, prompt = small_model(family, tmp_path), ids(43)
    gpu, loop = gpu_loop(model, driver_library, max_step_tokens=32)
    with loop:
        ours = loop.logits(prompt)
    run = {gpu.specialisations[launch.symbol].op for launch in gpu.launches}
    assert {"matmul", "matmul_tiled", "geglu", "attention_prefill"} <= run
    exact = reference(model, prompt, torch.float64)
    usual = np.abs(reference(model, prompt, torch.bfloat16) - exact)
    assert np.abs(ours - exact).max() <= 1.2 * usual.max()
    assert np.sqrt(np.mean((ours - exact) ** 2)) <= np.sqrt(np.mean(usual**2))


def test_graphs_give_the_bits_of_single_launches(gemma2: TinyModel, driver_library: Path) -> None:
    """Three sequences, filled up to four, in one graph that is replayed."""
    results = []
    asked = [{"token_ids": ids(3 + i, i), "max_tokens": 4, "logprobs": True} for i in range(3)]
    for captures in (True, False):
        gpu, loop = gpu_loop(gemma2, driver_library, captures)
        with loop:
            sequences = submit_together(gpu, loop, asked)
            results.append([[(e.token_id, e.logprob.logprob) for e in loop.finish(s)] for s in sequences])  # type: ignore[union-attr]
        calls = gpu.calls()
        assert calls.count("cuGraphInstantiate") == (2 if captures else 0)  # the first request's, and that of all three
        assert calls.count("cuGraphLaunch") == (4 if captures else 0)
    assert results[0] == results[1]


def test_a_batch_gives_the_tokens_of_its_members(gemma2: TinyModel, driver_library: Path) -> None:
    asked = [{"token_ids": ids(count, count), "max_tokens": 3} for count in (5, 12, 2)]  # and one that fills up
    gpu, loop = gpu_loop(gemma2, driver_library)
    with loop:
        together = [loop.tokens(sequence) for sequence in submit_together(gpu, loop, asked)]
        alone = [loop.tokens(loop.submit(**request)) for request in asked]
    assert together == alone
    assert len({tuple(tokens) for tokens in together}) == 3


def test_a_step_starts_before_the_one_before_it_is_waited_for(gemma2: TinyModel, driver_library: Path) -> None:
    gpu, loop = gpu_loop(gemma2, driver_library)
    before = len(gpu.calls())
    with loop:
        loop.finish(loop.submit([2], max_tokens=4))
    launch, wait = "cuGraphLaunch", "cuEventSynchronize"
    calls = [call for call in gpu.calls()[before:] if call in (launch, wait)]
    assert calls == [launch, launch, wait, launch, wait, launch, wait, wait]


RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "whole row": {"temperature": 1.5, "seed": 5},
    "first five": {"temperature": 2.0, "top_k": 5, "seed": 2**63 + 7},
    "most of the weight": {"temperature": 0.5, "top_p": 0.7, "min_p": 0.01, "seed": 3},
}


def test_tokens_chosen_on_the_device_are_those_of_the_host(gemma2: TinyModel, driver_library: Path) -> None:
    """Log-probabilities take the rows to the host, which then chooses. Rules differ within a batch."""
    gpu, loop = gpu_loop(gemma2, driver_library)
    chosen = []
    with loop:
        for logprobs in (True, False):
            asked = [
                {"token_ids": ids(4, i), "max_tokens": 3, "logprobs": logprobs, **rule}
                for i, rule in enumerate(RULES.values())
            ]
            sequences = submit_together(gpu, loop, asked)
            before = len(gpu.launches)
            chosen.append([loop.tokens(sequence) for sequence in sequences])
            draws = [launch.symbol.startswith("sample_draw") for launch in gpu.launches[before:]]
            assert any(draws) is not logprobs
    assert chosen[0] == chosen[1]
    assert len({tuple(tokens) for tokens in chosen[0]}) == len(RULES)


def test_the_host_chooses_what_the_device_cannot(gemma2: TinyModel, driver_library: Path) -> None:
    """Three hundred flat tokens: more than a block keeps."""
    gpu, loop = gpu_loop(gemma2, driver_library)
    rule = {"temperature": 50.0, "top_k": 300, "max_tokens": 2}
    with loop:
        row_bytes = 4 * loop.vocab_size
        ours = loop.tokens(loop.submit(ids(4), seed=11, **rule))
        copied = gpu.calls().count(f"cuMemcpyDtoHAsync {row_bytes}")
        assert loop.loop.stats()["num_prefill_tokens"] == 4  # no step ran ahead, so nothing was computed again
        assert ours == loop.tokens(loop.submit(ids(4), seed=11, logprobs=True, **rule))
        assert ours != loop.tokens(loop.submit(ids(4), seed=12, **rule))
    assert copied == 2
