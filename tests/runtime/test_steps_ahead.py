"""Steps that choose their tokens run one ahead of what the loop knows of them."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core

from .fake_step import DAMAGED, FAILING, FakeStep, Group, collect, expected_greedy, ids_of, prompt_of
from .loops import Gate, assert_all_free, greedy, running, two_groups


def stopping(prompt: list[int], max_tokens: int, stop: int) -> _core.Request:
    return _core.Request(token_ids=prompt, sampling=_core.SamplingParams(max_tokens=max_tokens, stop_token_ids=[stop]))


def test_a_step_ahead_is_lost_where_a_sequence_stops() -> None:
    """One step more than is needed shows that it ran ahead; the last token of all is known, and has none."""
    groups = two_groups(64)
    prompt = prompt_of(12)
    exact = expected_greedy(prompt, 20, groups)
    stop = next(i for i in range(5, 20) if exact[i] not in exact[:i])
    for chooses in (False, True):
        with running(FakeStep(groups), chooses=chooses) as loop:
            events = collect(loop, loop.submit(stopping(prompt, 20, exact[stop])))
            assert (ids_of(events), events[-1].finish_reason) == (exact[: stop + 1], "stop")
            collect(loop, loop.submit(greedy(prompt, 3)))  # one more after it: the lost step is over, too
            assert loop.stats()["num_decode_tokens"] == stop + chooses + 2
            assert_all_free(loop)


@pytest.mark.parametrize("host_every", [1, 2, 5])
def test_what_is_left_to_the_host_is_computed_again(host_every: int) -> None:
    groups = two_groups(16)
    step = FakeStep(groups, num_slots=3, host_every=host_every)
    with running(step, max_step_tokens=16, chooses=True) as loop:
        ids = [loop.submit(greedy(prompt_of(9 + 8 * i, i), 30)) for i in range(3)]
        for i, sequence_id in enumerate(ids):
            expected = expected_greedy(prompt_of(9 + 8 * i, i), 30, groups, recurrent=True)
            assert ids_of(collect(loop, sequence_id)) == expected
        stats = loop.stats()
        assert stats["num_preemptions"] == 0
        if host_every > 1:  # else no step ever ran ahead
            assert stats["num_prefill_tokens"] > 9 + 17 + 25
        assert_all_free(loop)


def test_no_step_runs_ahead_of_a_request_that_reads_logits() -> None:
    """It comes while a step is under way whose tokens are not known."""
    groups = two_groups(16)
    step = FakeStep(groups)
    gate = Gate(step)
    with running(step, run=gate.run, max_step_tokens=16, chooses=True) as loop:
        plain = loop.submit(greedy(prompt_of(11), 40))
        gate.hold_after(4)
        wordy = loop.submit(greedy(prompt_of(7, 1), 5, num_logprobs=2))
        gate.go.release(1000)
        events = collect(loop, wordy)
        assert ids_of(events) == expected_greedy(prompt_of(7, 1), 5, groups)
        assert all(event.logprob is not None for event in events)
        assert ids_of(collect(loop, plain)) == expected_greedy(prompt_of(11), 40, groups)


def test_prompts_alone_end_with_length() -> None:
    with running(FakeStep(two_groups(4)), max_step_tokens=4, chooses=True) as loop:
        events = collect(loop, loop.submit(greedy(prompt_of(11), 0)))
        assert [(event.token_id, event.finish_reason) for event in events] == [(None, "length")]
        assert_all_free(loop)


def test_a_step_that_fails_ends_what_was_started_after_it() -> None:
    groups = two_groups(16)
    step = FakeStep(groups)
    with running(step, max_step_tokens=16, chooses=True) as loop:
        ids = [loop.submit(greedy(prompt_of(5 + i, i), 40)) for i in range(3)]
        for sequence_id in ids:
            assert loop.wait(sequence_id, 20.0)
        failing = loop.submit(greedy([*prompt_of(6, 9), FAILING], 5))
        for sequence_id in [*ids, failing]:
            last = collect(loop, sequence_id)[-1]
            assert last.finish_reason in ("error", "length")
            assert last.message is None or "a token that this step cannot take" in last.message
        assert ids_of(collect(loop, loop.submit(greedy(prompt_of(8), 9)))) == expected_greedy(prompt_of(8), 9, groups)
        assert_all_free(loop)


def test_a_damaged_row_ends_its_own_sequence_alone() -> None:
    groups = [Group(None, 96, 24)]
    with running(FakeStep(groups), chooses=True) as loop:
        sound = loop.submit(greedy(prompt_of(8), 30))
        damaged = loop.submit(greedy([*prompt_of(5, 1), DAMAGED], 30))
        last = collect(loop, damaged)[-1]
        assert last.finish_reason == "error"
        assert last.message is not None
        assert "NaN" in last.message
        assert ids_of(collect(loop, sound)) == expected_greedy(prompt_of(8), 30, groups)


def test_cancelled_while_two_steps_are_under_way() -> None:
    groups = two_groups(16, sequences=2)
    step = FakeStep(groups, num_slots=2)
    gate = Gate(step)
    with running(step, run=gate.run, max_step_tokens=16, chooses=True) as loop:
        first = loop.submit(greedy(prompt_of(9), 60))
        gate.hold_after(4)
        loop.cancel(first)
        other = loop.submit(greedy(prompt_of(14, 1), 20))  # takes over the pages that the lost steps wrote to
        gate.go.release(1000)
        assert collect(loop, first)[-1].finish_reason == "cancelled"
        assert ids_of(collect(loop, other)) == expected_greedy(prompt_of(14, 1), 20, groups, recurrent=True)
        assert_all_free(loop)


def test_the_youngest_waits_for_pages_of_one_that_waits_for_its_last_token() -> None:
    """Four pages of four tokens; the older needs two, the younger three."""
    step = FakeStep([Group(None, 4, 4)])
    gate = Gate(step)
    with running(step, run=gate.run, max_step_tokens=4, max_running=2, chooses=True) as loop:
        requests = [greedy(prompt_of(5), 4), greedy(prompt_of(8, 1), 4)]
        older, younger = (loop.submit(request) for request in requests)
        gate.go.release(1000)
        assert ids_of(collect(loop, older)) == expected_greedy(prompt_of(5), 4, step.groups)
        assert ids_of(collect(loop, younger)) == expected_greedy(prompt_of(8, 1), 4, step.groups)
        assert_all_free(loop)


def test_a_loop_leaves_no_step_unfinished_to_the_next_one() -> None:
    step = FakeStep(two_groups(16))
    gate = Gate(step)
    core_step = _core.CallbackStep(gate.run, step.choose)
    limits = _core.Limits(max_running_sequences=1, max_step_tokens=16, max_seq_len=96, max_logits_rows=8, vocab_size=97)
    loop = _core.DecodeLoop(core_step, step.plan(), limits)
    cut_off = loop.submit(greedy(prompt_of(9), 60))
    gate.hold_after(4)
    closing = threading.Thread(target=loop.close)
    closing.start()
    time.sleep(0.05)
    gate.go.release(1000)
    closing.join()
    assert collect(loop, cut_off)[-1].finish_reason == "cancelled"
    after = _core.DecodeLoop(core_step, step.plan(), limits)
    try:
        ids = ids_of(collect(after, after.submit(greedy(prompt_of(14, 1), 9))))
    finally:
        after.close()
    assert ids == expected_greedy(prompt_of(14, 1), 9, step.groups)


def test_a_step_is_finished_though_nobody_is_left() -> None:
    """Else its error would meet the next request."""
    step = FakeStep(two_groups(16))
    gate = Gate(step)
    with running(step, run=gate.run, max_step_tokens=16, chooses=True) as loop:
        only = loop.submit(greedy(prompt_of(9), 60))
        gate.hold_after(4)
        loop.cancel(only)
        gate.go.release(1000)
        assert collect(loop, only)[-1].finish_reason == "cancelled"
        deadline = time.monotonic() + 10
        while loop.stats()["num_steps"] < len(step.steps) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert loop.stats()["num_steps"] == len(step.steps)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [([], "choose must return 1 tokens, but returned 0"), ("no", "Unable to cast"), ([1, 2], "but returned 2")],
)
def test_a_choice_of_something_else(chosen: Any, message: str) -> None:
    with running(FakeStep([Group(None, 24, 24)]), choose=lambda logits, rules: chosen) as loop:
        last = collect(loop, loop.submit(greedy([3], 2)))[-1]
    assert last.finish_reason == "error"
    assert last.message is not None
    assert message in last.message


def test_rules_reach_the_choice() -> None:
    """Each row's own parameters, and how many tokens its sequence has generated."""
    seen: list[tuple[float, int | None, float, float, int, int]] = []

    def choose(logits: NDArray[np.float32], rules: list[tuple[_core.SamplingParams, int]]) -> list[int]:
        seen.extend((p.temperature, p.top_k, p.top_p, p.min_p, p.seed, index) for p, index in rules)
        return [5] * len(logits)

    sampling = _core.SamplingParams(max_tokens=3, temperature=0.5, top_k=7, top_p=0.75, min_p=0.25, seed=2**63 + 1)
    with running(FakeStep([Group(None, 24, 24)]), choose=choose) as loop:
        events = collect(loop, loop.submit(_core.Request(token_ids=[3], sampling=sampling)))
    assert ids_of(events) == [5, 5, 5]
    assert seen == [(0.5, 7, 0.75, 0.25, 2**63 + 1, index) for index in range(3)]
