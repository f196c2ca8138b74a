"""Small models through the public face, beside the reference; one of them on the imagined GPU, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma2_fast import Generation, SamplingParams
from gemma2_fast.reference.model import ReferenceModel
from tests.gpu.conftest import Judge
from tests.gpu.models import NUM_LOGPROBS, Case, SmallModel, imagine_a_gpu, written_model
from tests.gpu.places import INTERPRETER, cases
from tests.support.mutants import mutants_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),  # gelu(x) of a large negative x divides by it
]

WINDOW_KEYS = 70  # a page of 64 and a bit
# Head dims and groups that are compiled; scores spread as those of narrow heads do in tests.support.tiny_models.
MODELS = {
    "Gemma 2, heads of 128": Case(
        "gemma2",
        {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 72, "seed": 5}
        | {"intermediate_size": 96, "num_hidden_layers": 4, "sliding_window": WINDOW_KEYS},
    ),
    "Gemma 2, heads of 256": Case(
        "gemma2",
        {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 144, "seed": 5}
        | {"intermediate_size": 96, "num_hidden_layers": 4, "sliding_window": WINDOW_KEYS},
    ),
    "Gemma 1, one kv head": Case(
        "gemma",
        {"head_dim": 256, "num_attention_heads": 8, "num_key_value_heads": 1, "seed": 4}
        | {"intermediate_size": 96, "num_hidden_layers": 4},
    ),
    "Gemma 3": Case(
        "gemma3_text",
        {"head_dim": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "query_pre_attn_scalar": 400, "seed": 0}
        | {"intermediate_size": 96, "num_hidden_layers": 6, "sliding_window": WINDOW_KEYS},
    ),
}
SMALL = Case(
    "gemma2",
    {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2},
    prompt_tokens=18,
    new_tokens=2,
    batch=(1, 12),
    batch_tokens=2,
    rules=(SamplingParams(temperature=1.5, seed=5),),
    sizes={"max_seq_len": 64, "max_step_tokens": 32},
)
MARGIN = 2.0  # of mutants: one key more or less of seventy moves logits by five times the bound


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> SmallModel:
    place, case = request.param
    directory = tmp_path_factory.mktemp("model")
    written = written_model(case, directory)
    if place is INTERPRETER:
        imagine_a_gpu(written, request.getfixturevalue("driver_library"), monkeypatch)
    return SmallModel(case, written, monkeypatch)


on_models = pytest.mark.parametrize(
    "model",
    [pytest.param(row.values, id=row.id, marks=row.marks) for row in cases(MODELS, {"Gemma 2": SMALL})],
    indirect=True,
)


@on_models
def test_logits(judge: Judge, model: SmallModel) -> None:
    """Of a prompt past the window in steps of many tokens and of few, by prefill alone."""
    ids = model.ids(model.case.prompt_tokens + model.case.new_tokens)
    with model.open() as generator:
        assert generator.backend == "cuda"
        ours = torch.from_numpy(generator.logits(ids))
    exact, usual = model.reference(ids, torch.float64), model.reference(ids, torch.bfloat16)
    judge.close(ours, exact, usual)
    for _, spec, weights in mutants_of(model.model.spec, model.model.weights):
        judge.rejects(ReferenceModel(spec, weights, torch.float64).logits(ids), exact, usual.float(), MARGIN)


@on_models
def test_a_long_text(judge: Judge, model: SmallModel) -> None:
    """Past the window; the same tokens when the device chooses them, and the same bits at a second time."""
    prompt, asked = model.ids(model.case.prompt_tokens), {"max_tokens": model.case.new_tokens, "ignore_eos": True}
    with model.open() as generator:
        first, second = (generator.generate(prompt, logprobs=NUM_LOGPROBS, **asked) for _ in range(2))
        chosen_there = generator.generate(prompt, **asked)
    with model.open(captures=False) as generator:
        uncaptured = generator.generate(prompt, logprobs=NUM_LOGPROBS, **asked)
    model.assert_greedy(judge, [prompt], [first])
    assert bits(first) == bits(second)
    assert bits(first) == bits(uncaptured)
    assert first.token_ids == chosen_there.token_ids
    assert len(set(first.token_ids)) >= min(10, model.case.new_tokens)


def bits(made: Generation) -> tuple[Any, ...]:
    assert made.logprobs is not None
    return made.token_ids, [row.top for row in made.logprobs]


@on_models
def test_a_ragged_batch_and_its_members(judge: Judge, model: SmallModel) -> None:
    """Products of one and of several tokens round in their own ways, so both are held against the reference."""
    asked = {"max_tokens": model.case.batch_tokens, "ignore_eos": True, "logprobs": NUM_LOGPROBS}
    with model.open() as generator:
        together = generator.generate(model.batch(), **asked)
        alone = [generator.generate(prompt, **asked) for prompt in model.batch()]
    model.assert_greedy(judge, model.batch(), together)
    model.assert_greedy(judge, model.batch(), alone)
    assert len({made.token_ids for made in together}) == len(together)


@on_models
def test_samples_are_those_of_the_host(model: SmallModel) -> None:
    """Log-probabilities take the rows to the host, which then chooses."""
    prompt, asked = model.ids(4), {"max_tokens": model.case.batch_tokens, "ignore_eos": True}
    with model.open() as generator:
        there = [generator.generate(prompt, rule, **asked).token_ids for rule in model.case.rules]
        here = [generator.generate(prompt, rule, logprobs=0, **asked).token_ids for rule in model.case.rules]
    assert there == here
    assert len(set(there)) == len(there)
