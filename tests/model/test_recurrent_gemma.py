"""Where transformers' RecurrentGemma is right, and where it is not: DeepMind's own code is the authority.

These tests say what the oracles of this family may be used for. One that fails after an update of transformers is good
news: then tests/support/tiny_models.py can do without its correction.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from gemma2_fast.reference import ReferenceModel
from tests.support.tiny_models import WINDOW_KEYS, TinyModel, tiny_model

LENGTH = 40
CLOSE, FAR = 1e-3, 0.01


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("recurrent_gemma", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def theirs(tiny: TinyModel) -> PreTrainedModel:
    """The checkpoint as transformers reads it, whose window is one key narrower than it means."""
    return AutoModelForCausalLM.from_pretrained(tiny.directory, attn_implementation="eager").eval()


def token_ids() -> torch.Tensor:
    return torch.randint(3, 512, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def ours(tiny: TinyModel) -> torch.Tensor:
    return ReferenceModel(tiny.spec, tiny.weights, torch.float32).logits(token_ids()[0].tolist())


def differences(logits: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """The largest of every row."""
    return (logits - ours).abs().amax(dim=-1)


def test_a_prompt_within_the_window(theirs: PreTrainedModel, ours: torch.Tensor) -> None:
    """They part at the first token that has more earlier keys than transformers' window shows."""
    with torch.no_grad():
        difference = differences(theirs(token_ids()).logits[0], ours)
    assert theirs.config.attention_window_size == WINDOW_KEYS - 1
    assert difference[: WINDOW_KEYS - 1].max() < CLOSE
    assert difference[WINDOW_KEYS - 1] > FAR


def test_a_window_set_one_wider(tiny: TinyModel, ours: torch.Tensor) -> None:
    with torch.no_grad():
        logits = tiny.oracle(torch.float32)(token_ids(), use_cache=False).logits[0]
    assert differences(logits, ours).max() < CLOSE


def test_a_prompt_in_two_calls(tiny: TinyModel, ours: torch.Tensor) -> None:
    """transformers forgets the convolution's inputs between calls of several tokens; ours are the same however cut."""
    oracle, cut = tiny.oracle(torch.float32), 5
    cache = DynamicCache(config=oracle.config)
    with torch.no_grad():
        first = oracle(token_ids()[:, :cut], past_key_values=cache, use_cache=True)
        second = oracle(token_ids()[:, cut : cut + 3], past_key_values=cache, use_cache=True)
    assert differences(first.logits[0], ours[:cut]).max() < CLOSE
    assert differences(second.logits[0], ours[cut : cut + 3])[0] > FAR
    model = ReferenceModel(tiny.spec, tiny.weights, torch.float32)
    assert differences(model.logits(token_ids()[0].tolist(), chunk_tokens=cut), ours).max() < CLOSE
