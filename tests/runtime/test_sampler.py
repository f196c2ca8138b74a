"""Every sampling feature against a plain numpy version, through the decode loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.errors import BackendError, RequestError

from .fake_step import collect, ids_of

VOCAB_SIZE = 1003  # several blocks of the sampler's scan and a ragged last one
PROMPT = [5, 17, 5, 900]
MASK64 = 2**64 - 1


def table(scale: float, seed: int = 0) -> NDArray[np.float32]:
    """One row of logits a position; position p has row p."""
    return (np.random.default_rng(seed).standard_normal((64, VOCAB_SIZE)) * scale).astype(np.float32)


def capped(rows: NDArray[np.float32], cap: float | None) -> NDArray[np.float32]:
    """What a model with this final soft cap means by its logits; the sampler gets them without it."""
    return rows if cap is None else (cap * np.tanh(rows.astype(np.float64) / cap)).astype(np.float32)


def run_requests(rows: NDArray[np.float32], requests: Sequence[_core.Request], **limits: Any) -> list[list[int]]:
    return [ids_of(events) for events in run_events(rows, requests, **limits)]


def run_events(
    rows: NDArray[np.float32], requests: Sequence[_core.Request], **limits: Any
) -> list[list[_core.TokenEvent]]:
    def run(batch: StepBatch) -> NDArray[np.float32]:
        return rows[batch.positions[batch.logits_token]]

    defaults = {"max_running_sequences": 64, "max_step_tokens": 256, "max_seq_len": len(rows), "max_logits_rows": 256}
    loop = _core.DecodeLoop(
        _core.CallbackStep(run),
        _core.CachePlan(page_tokens=8, paged=[]),
        _core.Limits(**defaults | limits, vocab_size=rows.shape[1]),
    )
    try:
        return [collect(loop, sequence_id) for sequence_id in [loop.submit(request) for request in requests]]
    finally:
        loop.close()


def request(prompt: Any = PROMPT, num_logprobs: Any = None, **sampling: Any) -> _core.Request:
    params = _core.SamplingParams(**{"max_tokens": 20, **sampling})
    return _core.Request(token_ids=prompt, sampling=params, num_logprobs=num_logprobs)


def mix(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK64
    return x ^ (x >> 31)


def uniform(seed: int, index: int) -> float:
    golden = 0x9E3779B97F4A7C15
    return float((mix((mix((seed + golden) & MASK64) + (index + 1) * golden) & MASK64) >> 11) / 2**53)


def choose(row: NDArray[np.float32], prompt: Sequence[int], generated: Sequence[int], params: dict[str, Any]) -> int:
    """The rule of the sampler with whole sorts and no cleverness, in float64."""
    logits = row.astype(np.float64)
    for token, bias in params.get("logit_bias", ()):
        logits[token] += bias
    for token in {*prompt, *generated}:
        penalty = params.get("repetition_penalty", 1.0)
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(generated):
        logits[token] -= params.get("presence_penalty", 0.0)
        logits[token] -= params.get("frequency_penalty", 0.0) * list(generated).count(token)
    if len(generated) < params.get("min_tokens", 0):
        logits[list(params["stop_token_ids"])] = -np.inf
    if params.get("temperature", 0.0) == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")[: params.get("top_k") or len(logits)]
    weights = np.exp((logits[order] - logits.max()) / params["temperature"])
    # The smallest set that reaches top_p: up to and with the first cumulative sum that does.
    size = int(np.searchsorted(np.cumsum(weights), params.get("top_p", 1.0) * weights.sum())) + 1
    order, weights = order[:size], weights[:size]
    keep = weights >= params.get("min_p", 0.0) * weights.max()
    order, weights = order[keep], weights[keep]
    by_id = np.argsort(order)
    order, weights = order[by_id], weights[by_id]
    draw = uniform(params.get("seed", 0), len(generated)) * weights.sum()
    return int(order[min(np.searchsorted(np.cumsum(weights), draw, side="right"), len(order) - 1)])


def expected(rows: NDArray[np.float32], params: dict[str, Any], prompt: Sequence[int] = PROMPT) -> list[int]:
    generated: list[int] = []
    while len(generated) < params.get("max_tokens", 20):
        row = rows[len(prompt) - 1 + len(generated)]
        generated.append(choose(row, prompt, generated, params))
        if generated[-1] in params.get("stop_token_ids", ()):
            break
    return generated


def test_greedy_takes_the_lowest_id_of_equals() -> None:
    rows = np.zeros((64, VOCAB_SIZE), np.float32)
    rows[3, [700, 70, 701]] = 2
    rows[4] = -np.inf
    rows[4, 1002] = -1e30
    assert run_requests(rows, [request(max_tokens=3)]) == [[70, 1002, 0]]


def test_the_first_draws_by_hand() -> None:
    assert [uniform(0, i) for i in range(2)] == pytest.approx([0.652448, 0.701212], abs=1e-6)
    rows = np.full((64, VOCAB_SIZE), -np.inf, np.float32)
    rows[:, [10, 20, 30, 40]] = 3
    # So of four equally likely tokens it takes numbers 2 and 2, counted from 0.
    assert run_requests(rows, [request(max_tokens=2, temperature=1.0)]) == [[30, 30]]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {10, 20}),
        ({"top_p": 0.5}, {10, 20}),
        ({"top_p": 0.51}, {10, 20, 30}),
        ({"top_p": 0.0}, {10}),
        ({"top_k": 3, "top_p": 0.5}, {10, 20}),
        ({"min_p": 1.0}, {10, 20, 30, 40}),
    ],
    ids=str,
)
def test_equals_at_the_edge_go_by_id(params: dict[str, Any], kept: set[int]) -> None:
    rows = np.full((64, VOCAB_SIZE), -np.inf, np.float32)
    rows[:, [10, 20, 30, 40]] = 3
    assert set(run_requests(rows, [request(max_tokens=50, temperature=1.0, **params)])[0]) == kept


FEATURES: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 2.0, "top_k": 64},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0, "top_p": 0.5},
    {"temperature": 3.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.999999},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 2.0, "top_p": 0.9, "min_p": 0.02},
    {"logit_bias": [(3, 4.0), (900, -100.0), (4, 30.0), (8, -np.inf)]},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"temperature": 1.0, "repetition_penalty": 1.3, "top_k": 20},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.5, "frequency_penalty": 0.4, "temperature": 0.5},
    {
        "temperature": 1.1, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2,
        "presence_penalty": 0.3, "frequency_penalty": 0.2, "logit_bias": [(7, 2.5)],
    },
]  # fmt: skip


@pytest.mark.parametrize("params", FEATURES, ids=str)
@pytest.mark.parametrize("cap", [None, 30.0, 2.5])
def test_each_feature_equals_numpy(params: dict[str, Any], cap: float | None) -> None:
    for scale in (0.3, 3.0, 30.0):  # nearly flat, like a model, nearly certain
        rows = table(scale)
        if "penalty" in str(params):  # only matters where tokens come back
            rows[:] = rows[0] + table(0.3, seed=1)
        if cap is not None:  # far beyond the cap, values become equal in float32
            rows *= np.float32(min(1, 4 * cap / np.abs(rows).max()))
        seeds = [0, 1, 2**64 - 1, 12345] if params.get("temperature") else [0]
        got = run_requests(rows, [request(**params, seed=seed) for seed in seeds], final_softcap=cap)
        assert got == [expected(capped(rows, cap), params | {"seed": seed}) for seed in seeds]


def test_the_cap_by_hand() -> None:
    """cap 2: a logit of ln 3 becomes 2 tanh(ln(3) / 2) = 1, and 2 ln 2 becomes 2 tanh(ln 2) = 1.2."""
    rows = np.zeros((4, 8), np.float32)
    rows[:, 3], rows[:, 5] = np.log(3), 2 * np.log(2)
    asked = request(prompt=[0], max_tokens=1, num_logprobs=2)
    ((event,),) = run_events(rows, [asked], final_softcap=2.0)
    normaliser = np.log(6 + np.exp(1.0) + np.exp(1.2))
    assert event.logprob is not None
    assert [token for token, _ in event.logprob.top] == [5, 3]
    assert [value for _, value in event.logprob.top] == pytest.approx([1.2 - normaliser, 1 - normaliser], abs=1e-6)


def test_bias_and_penalties_act_on_capped_logits() -> None:
    rows = np.zeros((64, VOCAB_SIZE), np.float32)
    rows[:, 5], rows[:, 9] = 400, 30  # 30 and 30 tanh(1) = 22.8 after the cap
    cases: list[tuple[dict[str, Any], int]] = [
        ({}, 5),
        ({"repetition_penalty": 1.4}, 9),  # 30 / 1.4 = 21.4; 400 / 1.4 would still win
        ({"repetition_penalty": 1.3}, 5),  # 23.1
        ({"logit_bias": [(9, 8.0)]}, 9),
        ({"logit_bias": [(9, 7.0)]}, 5),
    ]
    for params, winner in cases:
        (ids,) = run_requests(rows, [request(max_tokens=1, **params)], final_softcap=30.0)
        assert ids == [winner], params


def test_min_p_compares_capped_logits_far_below_zero() -> None:
    """The -19.9 of the others comes from logits of -23.9, which min_p would rule out."""
    rows = np.full((64, VOCAB_SIZE), 30 * np.arctanh(-19.9 / 30), np.float32)
    rows[:, 3] = 30 * np.arctanh(-10 / 30)
    (ids,) = run_requests(rows, [request(max_tokens=50, temperature=2.0, min_p=float(np.exp(-5)))], final_softcap=30.0)
    assert len(set(ids)) > 10


def test_logits_that_the_cap_makes_equal_keep_their_order() -> None:
    rows = np.zeros((64, VOCAB_SIZE), np.float32)
    rows[:, 7], rows[:, 70], rows[:, 700] = 600, 800, 700
    best, two = run_requests(
        rows, [request(max_tokens=1), request(temperature=1.0, top_k=2, max_tokens=50)], final_softcap=30.0
    )
    assert best == [70]
    assert set(two) == {70, 700}


def test_tokens_that_the_model_rules_out_stay_ruled_out() -> None:
    rows = np.full((64, VOCAB_SIZE), -np.inf, np.float32)
    rows[:, [3, 4]] = 0
    params = [{"temperature": 100.0}, {"temperature": 100.0, "top_p": 0.9999}, {"temperature": 1e3, "min_p": 1e-9}]
    for ids in run_requests(rows, [request(max_tokens=50, **p) for p in params], final_softcap=5.0):
        assert set(ids) == {3, 4}
    with_bias = request(max_tokens=50, temperature=100.0, logit_bias=[(3, 1.0)])
    assert set(run_requests(rows, [with_bias], final_softcap=5.0)[0]) == {3, 4}


@pytest.mark.parametrize("cap", [0.0, -1.0, np.inf, np.nan])
def test_a_cap_that_is_none(cap: float) -> None:
    with pytest.raises(BackendError, match="soft cap"):
        run_requests(table(1.0), [request()], final_softcap=cap)


def test_prompt_logits_are_capped() -> None:
    rows = table(20.0)
    rows[2, :4] = [-np.inf, 1e38, -1e38, 1e-30]
    out = np.empty((len(PROMPT), VOCAB_SIZE), np.float32)
    params = _core.SamplingParams(max_tokens=0)
    run_events(rows, [_core.Request(token_ids=PROMPT, sampling=params, logits_out=out)], final_softcap=30.0)
    exact = capped(rows[: len(PROMPT)], 30.0)
    exact[2, 0] = -np.inf
    np.testing.assert_allclose(out, exact, rtol=4e-7, atol=0)


def test_penalties_change_the_choice() -> None:
    """Guards the comparison above against inputs on which a feature does nothing."""
    rows = np.repeat(table(3.0)[:1], 64, axis=0)
    plain = run_requests(rows, [request()])[0]
    assert len(set(plain)) == 1
    features: list[dict[str, Any]] = [
        {"repetition_penalty": 1.7},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
    ]
    for feature in features:
        assert run_requests(rows, [request(**feature)])[0] != plain
    # Presence counts a token once, frequency every time: with equal strength the second falls further.
    presence, frequency = run_requests(rows, [request(presence_penalty=0.4), request(frequency_penalty=0.4)])
    assert presence != frequency


def test_repetition_covers_the_prompt_and_presence_does_not() -> None:
    rows = np.zeros((64, VOCAB_SIZE), np.float32)
    rows[:, 17], rows[:, 2] = 2.0, 1.5
    got = run_requests(rows, [request(max_tokens=1, repetition_penalty=2.0), request(max_tokens=1, presence_penalty=2)])
    assert got == [[2], [17]]


def test_min_tokens_masks_the_stops_until_then() -> None:
    rows = table(3.0)
    rows[:, 33] = 100
    params: dict[str, Any] = {"min_tokens": 5, "stop_token_ids": [33, 34], "temperature": 1.0, "top_p": 0.9}
    (ids,) = run_requests(rows, [request(**params)])
    assert ids == expected(rows, params)
    assert (len(ids), ids[-1]) == (6, 33)


def test_a_ban_on_every_token_is_an_error() -> None:
    rows = table(1.0)
    banned = request(logit_bias=[(token, -np.inf) for token in range(VOCAB_SIZE)])
    ((event,),) = run_events(rows, [banned])
    assert event.finish_reason == "error"
    assert event.message is not None
    assert "no token that could be chosen" in event.message


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e38])
def test_extreme_temperatures(temperature: float, cap: float | None) -> None:
    rows = table(3.0)
    (ids,) = run_requests(rows, [request(temperature=temperature, max_tokens=20, top_p=0.9)], final_softcap=cap)
    if temperature < 1:
        assert ids == run_requests(rows, [request()])[0]
    else:
        assert len(set(ids)) > 15


def test_the_same_seed_gives_the_same_tokens_whatever_the_batch() -> None:
    rows = table(2.0)
    alone = [run_requests(rows, [request(temperature=1.0, seed=seed)])[0] for seed in range(6)]
    requests = [request(temperature=1.0, seed=seed) for seed in (*range(6), 3, 3)]
    assert run_requests(rows, requests) == [*alone, alone[3], alone[3]]
    assert run_requests(rows, requests, max_step_tokens=3, max_logits_rows=2) == [*alone, alone[3], alone[3]]
    assert len({tuple(ids) for ids in alone}) == 6


def test_draws_follow_the_distribution() -> None:
    rows = np.full((2, 8), -np.inf, np.float32)
    chances = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    rows[:, 1:6] = np.log(chances) + 7
    requests = [request(prompt=[0], temperature=1.0, seed=seed, max_tokens=1) for seed in range(4000)]
    counts = np.bincount([ids[0] for ids in run_requests(rows, requests)], minlength=8)
    assert counts[[0, 6, 7]].tolist() == [0, 0, 0]
    chi_square = float(((counts[1:6] - 4000 * chances) ** 2 / (4000 * chances)).sum())
    assert chi_square < 18.5  # 99.9 % of right samplers stay below


def test_draws_of_one_sequence_are_uniform() -> None:
    draws = np.sort([uniform(7, index) for index in range(4000)])
    assert float(np.abs(draws - (np.arange(4000) + 0.5) / 4000).max()) < 0.031  # Kolmogorov-Smirnov, 99.9 %


@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("scale", [0.01, 3.0, 40.0])
def test_logprobs_are_of_the_capped_logits(scale: float, cap: float | None) -> None:
    rows = table(scale)
    rows[3, :40] = rows[3].max() + 1  # ties across the edge of the top
    rows[4, 500:] = -np.inf
    sampled = request(num_logprobs=7, temperature=0.7, repetition_penalty=1.4, logit_bias=[(9, 50.0)], max_tokens=3)
    (events,) = run_events(rows, [sampled], final_softcap=cap)
    for event, raw, row in zip(events, rows[3:6], capped(rows, cap)[3:6].astype(np.float64), strict=True):
        row[raw == -np.inf] = -np.inf
        shifted = row - row.max()
        logprobs = shifted - np.log(np.exp(shifted).sum())
        assert event.logprob is not None
        assert event.token_id is not None
        # float32 near the logits' size is all the precision there is
        near = {"abs": 1e-6 + 4e-7 * (cap or 0), "rel": 3e-7}
        assert event.logprob.logprob == pytest.approx(logprobs[event.token_id], **near)
        best = np.argsort(-raw, kind="stable")[:7]
        assert [token for token, _ in event.logprob.top] == best.tolist()
        assert [value for _, value in event.logprob.top] == pytest.approx(logprobs[best].tolist(), **near)


def test_all_of_the_vocabulary_as_top_logprobs() -> None:
    (events,) = run_events(table(3.0), [request(num_logprobs=VOCAB_SIZE, max_tokens=1)])
    assert events[0].logprob is not None
    top = events[0].logprob.top
    assert sorted(token for token, _ in top) == list(range(VOCAB_SIZE))
    assert sum(np.exp(value) for _, value in top) == pytest.approx(1, abs=1e-5)
    with pytest.raises(RequestError, match="num_logprobs"):
        run_events(table(3.0), [request(num_logprobs=VOCAB_SIZE + 1)])
