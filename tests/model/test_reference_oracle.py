"""The reference is transformers' eager models, in float64 to the last digits; every mutant is far from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from gemma2_fast.reference import ReferenceModel
from gemma2_fast.spec import RecurrentSpec
from tests.support.mutants import RECURRENCE_MUTANTS, REFERENCE_MUTANTS, mutants_of
from tests.support.tiny_models import (
    FAMILIES,
    WINDOW_KEYS,
    TinyModel,
    exact_arithmetic,
    frequency_buffers,
    tiny_model,
)

EXACT_TOLERANCE = 1e-9
FLOAT32_ROUNDING = 2.0**-24
NEW_TOKENS = 200
MUTANT_MARGIN = 100
# One token, the window's edges, and past the window by more than a page.
LENGTHS = (1, WINDOW_KEYS - 1, WINDOW_KEYS, WINDOW_KEYS + 1, 2 * WINDOW_KEYS + 3, 75)

# The mistakes that can be made in each family; the others' features are absent there.
EXPECTED_MUTANTS = {
    "gemma": {"w instead of 1 + w", "wrong kv head", "gate and up swapped"},
    "gemma2": {
        "window+1",
        "window-1",
        "no score cap",
        "no final cap",
        "shifted layer pattern",
        "query scale head_dim ** -0.5",
        "w instead of 1 + w",
        "wrong kv head",
        "gate and up swapped",
    },
    "gemma3_text": {
        "window+1",
        "window-1",
        "shifted layer pattern",
        "local and global RoPE swapped",
        "query scale head_dim ** -0.5",
        "w instead of 1 + w",
        "wrong kv head",
        "gate and up swapped",
    },
    "recurrent_gemma": {
        "window+1",
        "window-1",
        "no final cap",
        "w instead of 1 + w",
        "gate and up swapped",
        "full rotary",
        "embedding scale not rounded",
        "no biases of the layers",
        "no bias of the attention",
        "no bias of the convolution",
        "no biases of the gates",
        "gates transposed",
        "gates swapped",
        "convolution backwards",
        "decay of sigmoid(decay)",
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model(request.param, tmp_path_factory.mktemp(request.param))


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 512, length).tolist()


def oracle_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0]


def exact_logits(tiny: TinyModel, token_ids: list[int]) -> torch.Tensor:
    oracle = tiny.oracle(torch.float64)
    with exact_arithmetic(tiny, oracle):
        return oracle_logits(oracle, token_ids)


def largest(values: torch.Tensor) -> float:
    return float(values.abs().max())


def rms(values: torch.Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def test_rope_frequencies_are_the_oracles(tiny: TinyModel) -> None:
    """transformers raises to a float32 power; rounding the exponent alone moves it by up to ln(base) roundings."""
    for theirs, rope in frequency_buffers(tiny, tiny.hf_model):
        assert theirs.dtype == torch.float32
        roundings = math.log(rope.base) + 4
        np.testing.assert_allclose(theirs.numpy(), rope.inverse_frequencies(), rtol=roundings * FLOAT32_ROUNDING)


@pytest.mark.parametrize("length", LENGTHS)
def test_float64(tiny: TinyModel, length: int) -> None:
    """With our frequencies in its buffers and float64 kept in its norms and softmax (see exact_arithmetic)."""
    model = ReferenceModel(tiny.spec, tiny.weights, torch.float64)
    logits = model.logits(prompt(length))
    assert logits.dtype == torch.float64
    assert logits.shape == (length, tiny.spec.vocab_size)
    assert largest(logits - exact_logits(tiny, prompt(length))) <= EXACT_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_in_units_of_the_oracles_own(tiny: TinyModel, dtype: torch.dtype) -> None:
    token_ids = prompt(LENGTHS[-1])
    exact = exact_logits(tiny, token_ids)
    plain = oracle_logits(tiny.oracle(dtype), token_ids)
    actual = ReferenceModel(tiny.spec, tiny.weights, dtype).logits(token_ids)
    assert actual.dtype == dtype
    for norm in (largest, rms):
        assert norm(actual - exact) <= 2 * norm(plain - exact) + FLOAT32_ROUNDING * norm(exact)


def test_bfloat16_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Weights stored in bfloat16 are used as they are, in any dtype."""
    stored = tiny_model("gemma2", tmp_path_factory.mktemp("bfloat16"), dtype="bfloat16")
    assert {tensor.format.name for tensor in stored.weights.values()} == {"BF16"}
    logits = ReferenceModel(stored.spec, stored.weights, torch.float64).logits(prompt(30))
    assert largest(logits - exact_logits(stored, prompt(30))) <= EXACT_TOLERANCE


OTHER_SHAPES = {
    "one kv head": {"num_key_value_heads": 1, "head_dim": 14},
    "all kv heads": {"num_key_value_heads": 6, "head_dim": 2},
    "odd widths": {"hidden_size": 42, "head_dim": 30, "intermediate_size": 33},
}
# A head of the recurrent family is its share of the width.
OTHER_RECURRENT_SHAPES = {
    "one kv head": {"num_attention_heads": 2},
    "all kv heads": {"num_attention_heads": 4, "num_key_value_heads": 4, "lru_width": 28},
    "odd widths": {"hidden_size": 36, "num_attention_heads": 3, "intermediate_size": 66, "lru_width": 51},
}


@pytest.mark.parametrize("shape", OTHER_SHAPES)
def test_other_shapes(tmp_path_factory: pytest.TempPathFactory, shape: str) -> None:
    for family in FAMILIES:
        config = (OTHER_RECURRENT_SHAPES if family == "recurrent_gemma" else OTHER_SHAPES)[shape]
        other = tiny_model(family, tmp_path_factory.mktemp(family), num_hidden_layers=3, **config)
        logits = ReferenceModel(other.spec, other.weights, torch.float64).logits(prompt(20))
        assert largest(logits - exact_logits(other, prompt(20))) <= EXACT_TOLERANCE, family


def test_greedy_ids(tiny: TinyModel) -> None:
    """Prompt and continuation are each longer than the window and a page."""
    length = 50
    token_ids = prompt(length)
    with torch.no_grad():
        generated = tiny.hf_model.generate(
            torch.tensor([token_ids]),
            attention_mask=torch.ones(1, length, dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
    expected = generated[0, length:].tolist()
    assert len(expected) == NEW_TOKENS
    assert len(set(expected)) >= 30, "a model that repeats itself proves nothing"
    assert ReferenceModel(tiny.spec, tiny.weights, torch.float32).generate_greedy(token_ids, NEW_TOKENS) == expected


def mutant_threshold(tiny: TinyModel, token_ids: list[int], exact: torch.Tensor) -> float:
    """A hundred times what is allowed in float32, which is far more than what is allowed in float64."""
    return MUTANT_MARGIN * 2 * largest(oracle_logits(tiny.oracle(torch.float32), token_ids) - exact)


def test_mutants_are_far_away(tiny: TinyModel) -> None:
    token_ids = prompt(LENGTHS[-1])
    exact = exact_logits(tiny, token_ids)
    mutants = mutants_of(tiny.spec, tiny.weights)
    assert {name for name, _, _ in mutants} == EXPECTED_MUTANTS[tiny.config["model_type"]]
    for name, spec, weights in mutants:
        logits = ReferenceModel(spec, weights, torch.float64).logits(token_ids)
        assert largest(logits - exact) >= mutant_threshold(tiny, token_ids, exact), name


def test_mutants_of_the_ops_are_far_away(tiny: TinyModel) -> None:
    token_ids = prompt(LENGTHS[-1])
    exact = exact_logits(tiny, token_ids)
    model = ReferenceModel(tiny.spec, tiny.weights, torch.float64)
    recurrent = any(isinstance(layer.mixer, RecurrentSpec) for layer in tiny.spec.layers)
    for name, mutate in (REFERENCE_MUTANTS | (RECURRENCE_MUTANTS if recurrent else {})).items():
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            difference = largest(model.logits(token_ids) - exact)
        if name == "cap after mask" and tiny.config.get("attn_logit_softcapping") is None:
            assert difference <= EXACT_TOLERANCE, "without a cap the order cannot matter"
        else:
            assert difference >= mutant_threshold(tiny, token_ids, exact), name
