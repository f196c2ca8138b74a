"""Steps in which some sequences decode while another's prompt goes on: the keys of the first are split, the queries of
the other lie in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gemma2_fast import _core
from gemma2_fast.spec import AttentionSpec
from tests.cuda.fake_gpu import FakeGpu, Launch, teach_bfloat16
from tests.cuda.loop import Floats
from tests.cuda.models import SmallModel
from tests.cuda.test_graph_step import gpu_loop, ids, reference, small_model, submit_together
from tests.cuda.test_recurrent_step import recurrent_model
from tests.support.tiny_models import TinyModel

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # of the gate of a large negative number
]

STEP_TOKENS = 32
# Two prompts and the beginning of a third are a step of so many tokens; the third goes on while the others decode.
DECODING, CHUNKS = (26, 3), (3, 30, 7)
NEW_TOKENS = 4

MODELS: dict[str, Callable[[Path], TinyModel | SmallModel]] = {
    "gemma2": lambda directory: small_model("gemma2", directory),
    "recurrent_gemma": lambda _: recurrent_model(),
}


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    teach_bfloat16(monkeypatch)


def steps(gpu: FakeGpu) -> list[list[Launch]]:
    """Every step begins with the embedding."""
    found: list[list[Launch]] = []
    for launch in gpu.launches:
        if gpu.specialisations[launch.symbol].op == "embed":
            found.append([])
        found[-1].append(launch)
    return found


def of_op(step: list[Launch], gpu: FakeGpu, op: str) -> Iterator[tuple[tuple[int, ...], int | None]]:
    """Grid and rows of a program, of each launch."""
    for launch in step:
        specialisation = gpu.specialisations[launch.symbol]
        if specialisation.op == op:
            yield launch.grid, specialisation.constants.get("ROWS")


def log_probabilities(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return MODELS[request.param](tmp_path)


def test_mixed_steps(model: TinyModel | SmallModel, driver_library: Path) -> None:
    """Past the window by more than a page; the third prompt's last tokens are few enough to split their keys, too."""
    gpu, loop = gpu_loop(model, driver_library, max_step_tokens=STEP_TOKENS)
    prompts = [ids(count, count) for count in (*DECODING, sum(CHUNKS))]
    logits = np.full((sum(CHUNKS), loop.vocab_size), np.nan, np.float32)
    with loop:
        asked: list[dict[str, Any]] = [
            {"token_ids": prompt, "max_tokens": NEW_TOKENS, "logprobs": True} for prompt in prompts[:2]
        ]
        asked.append({"token_ids": prompts[2], "max_tokens": 0, "logits_out": logits})
        *decoding, third = submit_together(gpu, loop, asked)
        events = [loop.finish(sequence) for sequence in decoding]
        loop.finish(third)

    assert_close(logits, model, prompts[2])
    for prompt, made in zip(prompts, events, strict=False):
        assert_likely(made, model, prompt)
    assert_planned(gpu, model)


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


def assert_planned(gpu: FakeGpu, model: TinyModel | SmallModel) -> None:
    """One launch more in a step that has both."""
    mixers = [layer.mixer for layer in model.spec.layers if isinstance(layer.mixer, AttentionSpec)]
    kv_heads, layers = mixers[0].num_kv_heads, len(mixers)
    queries_per_tile = 16 * kv_heads // mixers[0].num_query_heads

    def tiles(*counts: int) -> list[tuple[tuple[int, ...], int | None]]:
        num_tiles = sum(-(-count // queries_per_tile) for count in counts)
        return layers * [((num_tiles, kv_heads, 1), None)]

    def split(step: list[Launch]) -> list[tuple[tuple[int, ...], int | None]]:
        return [(grid[1:], rows) for grid, rows in of_op(step, gpu, "attention_decode")]

    _, prompts, mixed, tail, decode = steps(gpu)
    assert split(prompts) == []
    assert split(mixed) == split(decode) == layers * [((kv_heads, len(DECODING)), 16)]
    assert split(tail) == layers * [((kv_heads, len(DECODING) + 1), 32)]
    found = [list(of_op(step, gpu, "attention_prefill")) for step in (prompts, mixed, tail, decode)]
    assert found == [tiles(*DECODING, CHUNKS[0]), tiles(CHUNKS[1]), [], []]
    assert gpu.calls().count("cuGraphInstantiate") == 2  # of decode steps alone: the first request's, and the last step
