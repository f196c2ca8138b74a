"""Steps in which some sequences decode while another's prompt goes on: the keys of the first are split, the queries of
the other lie in tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast import _core
from gemma2_fast.triton_kernels.specialisation import Specialisation
from tests.cuda.fake_gpu import FakeGpu, Launch, teach_bfloat16
from tests.cuda.loop import Floats, Loop
from tests.cuda.models import SmallModel, gpu_step, small_kernels, small_plan, small_recurrent_model
from tests.cuda.test_graph_step import gpu_loop, ids, reference, small_model, submit_together
from tests.support.tiny_models import TinyModel

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the gate of a large negative number

STEP_TOKENS = 32
# Two prompts and the beginning of a third are a step of so many tokens; the third goes on while the others decode.
DECODING, CHUNKS = (26, 3), (3, 30, 7)
NEW_TOKENS = 4
PROMPTS = [ids(count, count) for count in (*DECODING, sum(CHUNKS))]

MODELS: dict[str, Callable[[Path], TinyModel | SmallModel]] = {
    "gemma2": lambda directory: small_model("gemma2", directory),
    "recurrent_gemma": lambda _: small_recurrent_model(),
}


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16(monkeypatch)


def log_probabilities(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def run(gpu: FakeGpu, loop: Loop) -> tuple[Floats, list[list[_core.TokenEvent]]]:
    """Logits of the third prompt, and what the two sequences that decode meanwhile give."""
    logits = np.full((sum(CHUNKS), loop.vocab_size), np.nan, np.float32)
    asked: list[dict[str, Any]] = [
        {"token_ids": prompt, "max_tokens": NEW_TOKENS, "logprobs": True} for prompt in PROMPTS[:2]
    ]
    asked.append({"token_ids": PROMPTS[2], "max_tokens": 0, "logits_out": logits})
    *decoding, third = submit_together(gpu, loop, asked)
    events = [loop.finish(sequence) for sequence in decoding]
    loop.finish(third)
    return logits, events


@pytest.mark.slow
@pytest.mark.parametrize("family", MODELS)
def test_logits_are_those_of_the_reference(family: str, driver_library: Path, tmp_path: Path) -> None:
    """Past the window by more than a page."""
    model = MODELS[family](tmp_path)
    gpu, loop = gpu_loop(model, driver_library, max_step_tokens=STEP_TOKENS)
    with loop:
        logits, events = run(gpu, loop)
    assert_close(logits, model, PROMPTS[2])
    for prompt, made in zip(PROMPTS, events, strict=False):
        assert_likely(made, model, prompt)


def assert_close(logits: Floats, model: TinyModel | SmallModel, prompt: list[int]) -> None:
    exact = reference(model, prompt, torch.float64)
    usual = np.abs(reference(model, prompt, torch.bfloat16) - exact)
    assert np.abs(logits - exact).max() <= 1.2 * usual.max()
    assert np.sqrt(np.mean((logits - exact) ** 2)) <= np.sqrt(np.mean(usual**2))


def assert_likely(made: list[_core.TokenEvent], model: TinyModel | SmallModel, prompt: list[int]) -> None:
    """The log-probabilities of chosen tokens."""
    tokens = [event.token_id for event in made if event.token_id is not None]
    whole = prompt + tokens[:-1]
    ours = [event.logprob.logprob for event in made if event.logprob is not None]
    exact, usual = (
        log_probabilities(reference(model, whole, dtype))[len(prompt) - 1 :]
        for dtype in (torch.float64, torch.bfloat16)
    )
    assert np.abs(ours - exact[range(NEW_TOKENS), tokens]).max() <= 1.2 * np.abs(usual - exact).max()


@dataclass(frozen=True)
class Attention:
    """A launch of it: tiles, as sequence and first query, or programs along each axis and rows of one."""

    tiles: tuple[tuple[int, int], ...] = ()
    grid: tuple[int, ...] = ()
    rows: int | None = None


class BlankGpu(FakeGpu):
    """Computes nothing but logits, which are all 0. `attention`: its launches of each step."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.attention: list[list[Attention]] = []

    def _compute(self, specialisation: Specialisation, kinds: dict[str, str], launch: Launch) -> None:
        given = {name: int(value) for name, value in launch.arguments.items()}
        match specialisation.op:
            case "embed":  # every step begins with it
                self.attention.append([])
            case "attention_decode":
                rows = int(specialisation.constants["ROWS"])
                self.attention[-1].append(Attention(grid=launch.grid, rows=rows))
            case "attention_prefill":
                tiles = self.tensor(given["tiles"], "i32")[: 2 * launch.grid[0]].tolist()
                self.attention[-1].append(Attention(tiles=tuple(zip(tiles[::2], tiles[1::2], strict=True))))
            case "matmul" if kinds["out"] == "*fp32":
                self.tensor(given["out"], "fp32")[: given["rows"] * given["num_tokens"]] = 0


def test_one_launch_more_where_a_step_has_both(driver_library: Path, tmp_path: Path) -> None:
    """Of three heads a query, tiles of sixteen rows hold five queries. The tail of the third prompt is few enough to
    split its keys, too; only the last step, of single tokens alone, is captured, and that of the first request."""
    model = small_model("gemma2", tmp_path)
    gpu = BlankGpu(driver_library, small_kernels(model.spec))
    plan = small_plan(model.spec, max_step_tokens=STEP_TOKENS)
    with Loop(gpu_step(gpu, model, plan), model, plan) as loop:
        run(gpu, loop)
    _, prompts, mixed, tail, decode = gpu.attention
    begun = [(0, 25), (0, 20), (0, 15), (0, 10), (0, 5), (0, 0), (1, 0), (2, 0)]
    singles = [Attention(grid=(splits, 2, 2), rows=16) for splits in (1, 2)]  # in a window of nine keys, and in all
    assert prompts == 2 * [Attention(tiles=tuple(begun))]
    chunk = Attention(tiles=tuple((2, first) for first in (25, 20, 15, 10, 5, 0)))
    assert mixed == [singles[0], chunk, singles[1], chunk]
    assert tail == 2 * [Attention(grid=(1, 2, 3), rows=32)]
    assert decode == singles
    assert gpu.calls().count("cuGraphInstantiate") == 2
