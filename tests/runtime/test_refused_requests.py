"""What can never be served is refused by submit, with a reason, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gemma2_fast import _core
from gemma2_fast.errors import CapacityError, RequestError

from .fake_step import (
    VOCAB_SIZE,
    FakeStep,
    Group,
    collect,
    ids_of,
    prompt_of,
)
from .loops import MAX_SEQ_LEN, assert_all_free, greedy, running, two_groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_ids": []}, "prompt is empty"),
        ({"token_ids": [1, VOCAB_SIZE]}, "token id 97 in the prompt is outside the vocabulary"),
        ({"token_ids": [-1]}, "token id -1"),
        ({"token_ids": [2**40]}, "token id 1099511627776"),
        ({"token_ids": [1] * (MAX_SEQ_LEN + 1)}, "97 tokens, but a sequence can have 96"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1, or absent, got 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"logit_bias": [(VOCAB_SIZE, 1.0)]}, "logit_bias"),
        ({"logit_bias": [(1, float("nan"))]}, "logit_bias"),
        ({"logit_bias": [(1, float("inf"))]}, "logit_bias"),
        ({"stop_token_ids": [-2]}, "stop_token_ids"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 9}, "min_tokens must be between 0 and max_tokens"),
        ({"num_logprobs": -1}, "num_logprobs"),
        ({"num_prompt_logprobs": VOCAB_SIZE + 1}, "num_prompt_logprobs"),
        ({"logits_out": np.zeros((1, VOCAB_SIZE), np.float64)}, "logits_out must be a writable"),
        ({"logits_out": np.zeros((2, VOCAB_SIZE), np.float32)}, "logits_out must be a writable"),
        ({"logits_out": np.zeros((1, VOCAB_SIZE - 1), np.float32)}, "logits_out holds 96 floats"),
        ({"logits_out": np.zeros((1, 2 * VOCAB_SIZE), np.float32)[:, ::2]}, "logits_out must be a writable"),
    ],
)
def test_requests_that_can_never_be_served(options: dict[str, object], message: str) -> None:
    fields = ("token_ids", "num_logprobs", "num_prompt_logprobs", "logits_out")
    sampling: dict[str, Any] = {"max_tokens": 8} | {k: v for k, v in options.items() if k not in fields}
    rest: dict[str, Any] = {"token_ids": [1]} | {k: v for k, v in options.items() if k in fields}
    with running(FakeStep(two_groups(64))) as loop:
        with pytest.raises(RequestError, match=message):
            loop.submit(_core.Request(sampling=_core.SamplingParams(**sampling), **rest))
        assert_all_free(loop)


def test_a_request_that_can_never_fit() -> None:
    step = FakeStep([Group(None, 5, 24)])
    with running(step) as loop:
        with pytest.raises(
            CapacityError, match=r"21 tokens .*12 of the prompt.* 6 blocks of 4 tokens.* can have 5; shorten"
        ):
            loop.submit(greedy(prompt_of(12), 10))
        assert len(ids_of(collect(loop, loop.submit(greedy(prompt_of(12), 9))))) == 9, "one token less fits exactly"


@pytest.mark.parametrize(
    ("group", "max_step_tokens", "message"),
    [
        (Group(None, 5, 5), 0, "max_step_tokens must be between 1"),
        (Group(None, 0, 5), 8, "between 1 and .* blocks, got 0"),
        (Group(None, 5, 0), 8, "table_width and a window of at least 1, got 0 and no window"),
        (Group(0, 5, 5), 8, "table_width and a window of at least 1, got 5 and 0"),
    ],
)
def test_bad_limits_and_plans(group: Group, max_step_tokens: int, message: str) -> None:
    step = FakeStep([group])
    with pytest.raises(CapacityError, match=message), running(step, max_step_tokens=max_step_tokens):
        pass
