"""The C++ engine, the reference and transformers give the same tokens; no mutant does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2_fast import Generator
from gemma2_fast.errors import ConfigError
from tests.support.checkpoints import generator
from tests.support.mutants import mutants_of
from tests.support.tiny_models import FAMILIES, WINDOW_KEYS, TinyModel, tiny_model

NEW_TOKENS = 200
# Ragged; the last two are past the window by more than a page of 32.
PROMPT_LENGTHS = (1, WINDOW_KEYS, 33, 2 * WINDOW_KEYS + 40, 101)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def prompts(vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(11)
    return [rng.integers(3, vocab_size, length).tolist() for length in PROMPT_LENGTHS]


def transformers_greedy(model: TinyModel, ids: list[int]) -> list[int]:
    oracle = model.oracle(torch.float32)
    with torch.no_grad():
        out = oracle.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    return [int(token) for token in out[0, len(ids) :]]


def test_greedy_ids_of_three_implementations(tiny: TinyModel) -> None:
    ids = prompts(tiny.spec.vocab_size)
    found = {}
    for backend in ("cpu", "reference"):
        with Generator.from_pretrained(tiny.directory, backend=backend, max_batch_size=3, max_step_tokens=50) as gen:
            assert gen.backend == backend
            assert gen.plan.cache.kv_dtype == "float32"
            found[backend] = gen.generate(ids, max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
    for index, prompt in enumerate(ids):
        official = transformers_greedy(tiny, prompt)
        assert len(official) == NEW_TOKENS
        assert len(set(official)) >= 30, "a model that repeats itself proves nothing"
        for backend, generations in found.items():
            assert list(generations[index].token_ids) == official, (backend, len(prompt))


def test_logits_are_close_and_mutants_are_not(tiny: TinyModel) -> None:
    """Within 4 times the official code's own float32 error; every mutant is a hundred times further off."""
    prompt = prompts(tiny.spec.vocab_size)[-1]
    with torch.no_grad():
        exact = tiny.oracle(torch.float64)(torch.tensor([prompt])).logits[0].numpy()
        plain = tiny.oracle(torch.float32)(torch.tensor([prompt])).logits[0].double().numpy()
    tolerance = 4 * float(np.abs(plain - exact).max())
    assert tolerance < 1e-2 * np.abs(exact).max()

    weights = dict(tiny.weights)
    with generator(tiny.spec, weights) as gen:
        assert np.abs(gen.logits(prompt) - exact).max() <= tolerance
    mutants = mutants_of(tiny.spec, weights)
    assert len(mutants) >= 3
    for name, spec, wrong_weights in mutants:
        with generator(spec, dict(wrong_weights)) as gen:
            assert np.abs(gen.logits(prompt) - exact).max() > 100 * tolerance, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stored_types(dtype: str, tmp_path: Path) -> None:
    """A bfloat16 checkpoint computes in float32 over exactly its own weights."""
    stored = tiny_model("gemma2", tmp_path, dtype=dtype)
    prompt = prompts(stored.spec.vocab_size)[2]
    with torch.no_grad():
        exact = stored.oracle(torch.float64)(torch.tensor([prompt])).logits[0].numpy()
    with Generator.from_pretrained(tmp_path, dtype="float32") as gen:
        assert np.abs(gen.logits(prompt) - exact).max() < 1e-3


def test_the_window_can_be_changed(tiny: TinyModel) -> None:
    if tiny.spec.family == "gemma":
        with pytest.raises(ConfigError, match="no layer"):
            Generator.from_pretrained(tiny.directory, sliding_window=2 * WINDOW_KEYS)
        return
    prompt = prompts(tiny.spec.vocab_size)[-1]
    wider = tiny.spec.with_window(2 * WINDOW_KEYS)
    with generator(wider, dict(tiny.weights)) as gen:
        expected = gen.logits(prompt)
    with Generator.from_pretrained(tiny.directory, sliding_window=2 * WINDOW_KEYS) as gen:
        assert np.array_equal(gen.logits(prompt), expected)
    with Generator.from_pretrained(tiny.directory) as gen:
        assert np.abs(gen.logits(prompt) - expected).max() > 0.01
