"""Small models behind the public face, on a card or on the imagined GPU of tests/cuda."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast import Generation, Generator, SamplingParams, _core
from gemma2_fast.engine import gpu as gpu_backend
from gemma2_fast.engine import memory, options
from gemma2_fast.reference.model import ReferenceModel
from tests.cuda.fake_gpu import FakeGpu, teach_bfloat16
from tests.cuda.models import PAGE, SMALL_BLOCKS, small_kernels
from tests.gpu.conftest import Judge
from tests.support.tiny_models import TinyModel, tiny_model

NUM_LOGPROBS = 5
# The interpreter takes a millisecond a program, of whatever size.
FEWER_BLOCKS = {
    "matmul": {"ROWS": 64, "COLS": 128},
    **{op: {"BLOCK": 256} for op in ("sample_scan", "sample_weigh", "sample_draw")},
}


@dataclass(frozen=True)
class Case:
    """family, config: of tests.support.tiny_models. prompt_tokens, new_tokens: of one long sequence, past the window.
    batch: lengths of prompts, and batch_tokens new ones of each.
    rules: by which tokens are drawn. unfelt: mutants that are less than what bfloat16 rounds."""

    family: str
    config: dict[str, Any]
    prompt_tokens: int = 20
    new_tokens: int = 200
    batch: tuple[int, ...] = (1, 2, 63, 64, 65, 130, 17, 200)
    batch_tokens: int = 60
    rules: tuple[SamplingParams, ...] = (
        SamplingParams(temperature=1.5, seed=5),
        SamplingParams(temperature=2.0, top_k=5, seed=2**63 + 7),
        SamplingParams(temperature=0.5, top_p=0.7, min_p=0.01, seed=3),
    )
    unfelt: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=lambda: {"max_seq_len": 512, "max_step_tokens": 128})


class SmallModel:
    """The model of a case, and generators of it."""

    def __init__(self, case: Case, model: TinyModel, patch: pytest.MonkeyPatch) -> None:
        self.case, self.model, self.patch = case, model, patch

    def open(self, captures: bool = True, **sizes: int) -> Generator:
        """With a cache full of NaN. captures=False launches every kernel by itself. sizes: other than the case's."""
        self.patch.setattr(gpu_backend._core, "GraphStep", _poisoned(captures))
        sizes = {"max_batch_size": len(self.case.batch), **self.case.sizes, **sizes}
        return Generator.from_pretrained(self.model.directory, backend="cuda", progress=False, **sizes)

    def ids(self, count: int, seed: int = 0) -> list[int]:
        return [2, *np.random.default_rng(seed).integers(3, 500, count - 1).tolist()]

    def batch(self) -> list[list[int]]:
        return [self.ids(count, seed) for seed, count in enumerate(self.case.batch)]

    def reference(self, ids: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return ReferenceModel(self.model.spec, self.model.weights, dtype).logits(ids).double()

    def assert_greedy(self, judge: Judge, prompts: Sequence[Sequence[int]], generations: Sequence[Generation]) -> None:
        """The likeliest five of every step have the reference's log-probabilities, and where its best two lie farther
        apart than twice what bfloat16 errs, the first of them was chosen. That must be so often enough to tell."""
        rows = [self._steps(prompt, made) for prompt, made in zip(prompts, generations, strict=True)]
        tokens, ours, ids, exact, usual = (torch.cat(parts) for parts in zip(*rows, strict=True))
        near = exact.gather(1, ids), usual.gather(1, ids)
        judge.close(ours, *near)
        best = exact.topk(2)
        clear = best.values[:, 0] - best.values[:, 1] > 2 * (near[1] - near[0]).abs().max()
        assert clear.float().mean() > 0.15, f"only {clear.sum()} of {len(clear)} choices are clear"
        assert torch.equal(tokens[clear], best.indices[clear, 0])

    def _steps(self, prompt: Sequence[int], made: Generation) -> list[torch.Tensor]:
        """Of every new token: it, the likeliest five with their log-probabilities, and the reference's of all."""
        assert made.logprobs is not None
        top = torch.tensor([row.top for row in made.logprobs], dtype=torch.float64)
        whole = [*prompt, *made.token_ids]
        exact, usual = (
            self.reference(whole, dtype)[len(prompt) - 1 : -1].log_softmax(-1)
            for dtype in (torch.float64, torch.bfloat16)
        )
        return [torch.tensor(made.token_ids), top[..., 1].float(), top[..., 0].long(), exact, usual]


def _poisoned(captures: bool, make: Callable[..., _core.GraphStep] = _core.GraphStep) -> Callable[..., _core.GraphStep]:
    def step(**arguments: Any) -> _core.GraphStep:
        made = make(**arguments, captures=captures)
        if arguments["allocates"]:
            made.poison_cache()
        return made

    return step


def imagine_a_gpu(model: TinyModel, driver_library: Path, patch: pytest.MonkeyPatch) -> None:
    teach_bfloat16(patch)
    gpu = FakeGpu(driver_library, small_kernels(model.spec, {**SMALL_BLOCKS, **FEWER_BLOCKS}))
    patch.setattr(options, "DRIVER_LIBRARY", gpu.path)
    patch.setattr(gpu_backend, "kernel_images", lambda arch: gpu.images())
    patch.setattr(memory, "GPU_PAGE_TOKENS", PAGE)


def written_model(case: Case, directory: Path) -> TinyModel:
    return tiny_model(case.family, directory, dtype="bfloat16", **case.config)
