"""Random arrivals, cancellations and pools: nothing deadlocks, nothing is over-committed, every id is right."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma2_fast import _core

from .fake_step import (
    PAGE_TOKENS,
    VOCAB_SIZE,
    FakeStep,
    Group,
    collect,
    expected_greedy,
    ids_of,
    prompt_of,
    ring_width,
)

MAX_SEQ_LEN = 44  # the longest prompt and all of its tokens


@dataclass(frozen=True)
class Load:
    prompt_tokens: int
    max_tokens: int
    wants_prompt: bool
    cancel_after: int | None  # events of this sequence until it is cancelled; 0 before any
    stop_at: int | None  # the generated token that is a stop token


@dataclass(frozen=True)
class Machine:
    windows: tuple[int | None, ...]
    spare_blocks: tuple[int, ...]  # beyond one sequence's need, a group
    num_slots: int
    max_running: int
    max_step_tokens: int
    max_logits_rows: int
    chooses: bool  # tokens, in the step
    host_every: int | None

    def groups(self) -> list[Group]:
        groups = []
        for window, spare in zip(self.windows, self.spare_blocks, strict=True):
            whole = MAX_SEQ_LEN // PAGE_TOKENS
            width = ring_width(window, 1, MAX_SEQ_LEN) if window else whole
            groups.append(Group(window, width + spare, ring_width(window, 5, MAX_SEQ_LEN) if window else whole))
        return groups


loads = st.builds(
    Load,
    prompt_tokens=st.integers(1, 30),
    max_tokens=st.integers(0, 14),
    wants_prompt=st.booleans(),
    cancel_after=st.none() | st.integers(0, 4),
    stop_at=st.none() | st.integers(0, 13),
)
windows = st.none() | st.integers(1, 13)
machines = st.integers(1, 2).flatmap(
    lambda num_groups: st.builds(
        Machine,
        windows=st.tuples(*[windows] * num_groups),
        spare_blocks=st.tuples(*[st.integers(0, 12)] * num_groups),
        num_slots=st.integers(0, 3),
        max_running=st.integers(1, 6),
        max_step_tokens=st.integers(1, 24),
        max_logits_rows=st.integers(1, 12),
        chooses=st.booleans(),
        host_every=st.none() | st.integers(1, 9),
    )
)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(machine=machines, load=st.lists(loads, min_size=1, max_size=8))
def test_any_load_on_any_machine(machine: Machine, load: list[Load]) -> None:
    groups = machine.groups()
    step = FakeStep(groups, num_slots=machine.num_slots, host_every=machine.host_every)
    limits = _core.Limits(
        max_running_sequences=machine.max_running,
        max_step_tokens=machine.max_step_tokens,
        max_seq_len=MAX_SEQ_LEN,
        max_logits_rows=machine.max_logits_rows,
        vocab_size=VOCAB_SIZE,
    )
    answers = [
        expected_greedy(prompt_of(one.prompt_tokens, i), one.max_tokens, groups, machine.num_slots > 0)
        for i, one in enumerate(load)
    ]
    stops = [
        answer[one.stop_at : one.stop_at + 1] if one.stop_at is not None else []
        for one, answer in zip(load, answers, strict=True)
    ]
    core_step = _core.CallbackStep(step.run, step.choose if machine.chooses else None)
    loop = _core.DecodeLoop(core_step, step.plan(), limits)
    try:
        ids = [
            loop.submit(
                _core.Request(
                    token_ids=prompt_of(one.prompt_tokens, i),
                    sampling=_core.SamplingParams(max_tokens=one.max_tokens, stop_token_ids=stops[i]),
                    num_prompt_logprobs=0 if one.wants_prompt else None,
                )
            )
            for i, one in enumerate(load)
        ]
        for sequence_id, one in zip(ids, load, strict=True):
            if one.cancel_after == 0:
                loop.cancel(sequence_id)
        for i, (sequence_id, one) in enumerate(zip(ids, load, strict=True)):
            events: list[_core.TokenEvent] = []
            while one.cancel_after and len(events) < one.cancel_after and not (events and events[-1].finish_reason):
                events += loop.wait(sequence_id, 20.0)
            if not (events and events[-1].finish_reason):
                if one.cancel_after:
                    loop.cancel(sequence_id)
                events += collect(loop, sequence_id)
            exact = answers[i]
            if stops[i]:
                exact = exact[: exact.index(stops[i][0]) + 1]
            scores = [row.token_id for event in events for row in event.prompt_logprobs]
            all_scores = prompt_of(one.prompt_tokens, i)[1:] if one.wants_prompt else []
            if events[-1].finish_reason in ("length", "stop"):
                assert (events[-1].finish_reason == "stop") == bool(stops[i])
                assert ids_of(events) == exact
                assert scores == all_scores
            else:
                assert events[-1].finish_reason == "cancelled"
                assert one.cancel_after is not None
                assert ids_of(events) == exact[: len(ids_of(events))]
                assert scores == all_scores[: len(scores)]
        stats = loop.stats()
    finally:
        loop.close()
    assert step.faults == []
    assert all(group["num_free"] == group["num_blocks"] for group in stats["groups"])
    assert all(stat["peak_held"] <= group.table_width for stat, group in zip(stats["groups"], groups, strict=True))
    assert stats["num_running"] == stats["num_waiting"] == 0
    assert all(tokens <= machine.max_step_tokens and rows <= machine.max_logits_rows for tokens, rows in step.steps)
