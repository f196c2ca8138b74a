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
FEW_KEYS = 10  # where nothing but their number makes one of them felt
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
    "RecurrentGemma": Case(
        "recurrent_gemma",
        {"hidden_size": 512, "num_attention_heads": 2, "seed": 21}
        | {"intermediate_size": 192, "num_hidden_layers": 3, "attention_window_size": FEW_KEYS},
        prompt_tokens=34,
        unfelt=("embedding scale not rounded",),
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
SMALL_RECURRENT = Case(
    "recurrent_gemma",
    {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64},
    prompt_tokens=6,
    batch_tokens=2,
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


def on(interpreted: dict[str, Case]) -> pytest.MarkDecorator:
    rows = [pytest.param(row.values, id=row.id, marks=row.marks) for row in cases(MODELS, interpreted)]
    return pytest.mark.parametrize("model", rows, indirect=True)


on_models = on({"Gemma 2": SMALL})


@on_models
def test_logits(judge: Judge, model: SmallModel) -> None:
    """Of a prompt past the window in steps of many tokens and of few, by prefill alone."""
    ids = model.ids(model.case.prompt_tokens + model.case.new_tokens)
    with model.open() as generator:
        assert generator.backend == "cuda"
        ours = torch.from_numpy(generator.logits(ids))
    exact, usual = model.reference(ids, torch.float64), model.reference(ids, torch.bfloat16)
    judge.close(ours, exact, usual)
    for name, spec, weights in mutants_of(model.model.spec, model.model.weights):
        if name not in model.case.unfelt:
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


@on({"Gemma 2": SMALL, "RecurrentGemma": SMALL_RECURRENT})
def test_a_cancelled_sequence_leaves_nothing(model: SmallModel) -> None:
    """The next one has its pages and its state, and the same bits as the first of all."""
    prompt, other = model.ids(model.case.prompt_tokens), model.ids(model.case.prompt_tokens + 3, seed=1)
    asked = {"max_tokens": model.case.batch_tokens, "ignore_eos": True, "logprobs": NUM_LOGPROBS}
    with model.open(max_batch_size=1) as generator:
        alone = generator.generate(prompt, **asked)
    with model.open(max_batch_size=1) as generator:
        with generator.stream(other, max_tokens=40, ignore_eos=True) as chunks:
            next(chunks)
        after = generator.generate(prompt, **asked)
    assert bits(after) == bits(alone)


@on_models
def test_samples_are_those_of_the_host(model: SmallModel) -> None:
    """Log-probabilities take the rows to the host, which then chooses."""
    prompt, asked = model.ids(4), {"max_tokens": model.case.batch_tokens, "ignore_eos": True}
    with model.open() as generator:
        there = [generator.generate(prompt, rule, **asked).token_ids for rule in model.case.rules]
        here = [generator.generate(prompt, rule, logprobs=0, **asked).token_ids for rule in model.case.rules]
    assert there == here
    assert len(set(there)) == len(there)
