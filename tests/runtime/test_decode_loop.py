"""The decode loop over a fake step: batching, chunks, preemption, cancellation."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.errors import CapacityError, RequestError

from .fake_step import (
    PAGE_TOKENS,
    VOCAB_SIZE,
    FakeStep,
    Group,
    collect,
    expected_greedy,
    expected_logits,
    ids_of,
    prompt_of,
    ring_width,
)
from .loops import MAX_SEQ_LEN, WINDOW, Gate, assert_all_free, greedy, running, successor, two_groups


def test_counting_by_hand() -> None:
    step = FakeStep([Group(None, 3, 3)])
    with running(step, run=successor, max_step_tokens=2) as loop:
        events = collect(loop, loop.submit(greedy([3, 4, 5], 4)))
        assert ids_of(events) == [6, 7, 8, 9]
        assert [event.finish_reason for event in events] == [None, None, None, "length"]
        assert [event.time_ns for event in events] == sorted(event.time_ns for event in events)
        stats = loop.stats()
        assert (stats["num_steps"], stats["num_prefill_tokens"], stats["num_decode_tokens"]) == (5, 3, 3)
        # Six tokens are ever computed (the last is not read back): two pages of four.
        assert stats["groups"] == [{"num_blocks": 3, "num_free": 3, "peak_held": 2}]


def test_a_stop_token_is_delivered_and_ends() -> None:
    step = FakeStep([Group(None, 24, 24)])
    with running(step, run=successor) as loop:
        sampling = _core.SamplingParams(max_tokens=50, stop_token_ids=[40, 12])
        events = collect(loop, loop.submit(_core.Request(token_ids=[9], sampling=sampling)))
        assert (ids_of(events), events[-1].finish_reason) == ([10, 11, 12], "stop")


def test_min_tokens_puts_the_stop_off() -> None:
    def prefers_stop(batch: StepBatch) -> NDArray[np.float32]:
        logits = successor(batch)
        logits[:, 50] = 9
        return logits

    with running(FakeStep([Group(None, 24, 24)]), run=prefers_stop) as loop:
        sampling = _core.SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=[50])
        events = collect(loop, loop.submit(_core.Request(token_ids=[9], sampling=sampling)))
        assert (ids_of(events), events[-1].finish_reason) == ([10, 11, 12, 50], "stop")


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("max_step_tokens", [1, 7, 64, MAX_SEQ_LEN])
@pytest.mark.parametrize("length", [1, PAGE_TOKENS, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 61])
def test_chunks_do_not_change_the_ids(length: int, max_step_tokens: int, chooses: bool) -> None:
    groups = two_groups(max_step_tokens, sequences=1)
    step = FakeStep(groups, num_slots=1)
    with running(step, max_step_tokens=max_step_tokens, chooses=chooses) as loop:
        events = collect(loop, loop.submit(greedy(prompt_of(length), 35)))
        assert ids_of(events) == expected_greedy(prompt_of(length), 35, groups, recurrent=True)
        assert max(tokens for tokens, _ in step.steps) == min(length, max_step_tokens)
        assert loop.stats()["num_preemptions"] == 0
        assert_all_free(loop)


def test_slots_of_snapshots_are_no_sequences() -> None:
    """Room for two sequences beside two snapshots: the third waits."""
    groups = two_groups(16)
    step = FakeStep(groups, num_slots=4, num_snapshots=2)
    with running(step, max_step_tokens=16) as loop:
        ids = [loop.submit(greedy(prompt_of(9, i), 30)) for i in range(3)]
        for i, sequence_id in enumerate(ids):
            assert ids_of(collect(loop, sequence_id)) == expected_greedy(prompt_of(9, i), 30, groups, recurrent=True)
    with pytest.raises(CapacityError, match="between 1 and"), running(FakeStep(groups, num_slots=2, num_snapshots=2)):
        pass


@pytest.mark.parametrize("chooses", [False, True])
@pytest.mark.parametrize("max_step_tokens", [3, 7, 64])
def test_a_ragged_batch_gives_the_ids_of_single_runs(max_step_tokens: int, chooses: bool) -> None:
    groups = two_groups(max_step_tokens)
    step = FakeStep(groups, num_slots=5)
    lengths = [1, 40, 3, 23, 1, 11, 60, 17]
    with running(step, max_step_tokens=max_step_tokens, chooses=chooses) as loop:
        ids = [loop.submit(greedy(prompt_of(n, i), 30)) for i, n in enumerate(lengths)]
        for i, (sequence_id, n) in enumerate(zip(ids, lengths, strict=True)):
            events = collect(loop, sequence_id)
            assert ids_of(events) == expected_greedy(prompt_of(n, i), 30, groups, recurrent=True)
        assert max(tokens for tokens, _ in step.steps) <= max_step_tokens
        assert_all_free(loop)


@pytest.mark.parametrize(("chooses", "host_every"), [(False, None), (True, None), (True, 13)])
def test_a_pool_for_two_of_eight(chooses: bool, host_every: int | None) -> None:
    groups = two_groups(16, sequences=2)
    step = FakeStep(groups, num_slots=8, host_every=host_every)
    with running(step, max_step_tokens=16, chooses=chooses) as loop:
        ids = [loop.submit(greedy(prompt_of(20 + i, i), 60)) for i in range(8)]
        for i, sequence_id in enumerate(ids):
            events = collect(loop, sequence_id)
            assert ids_of(events) == expected_greedy(prompt_of(20 + i, i), 60, groups, recurrent=True)
            assert events[-1].finish_reason == "length"
        stats = loop.stats()
        assert stats["num_preemptions"] > 0
        assert stats["num_prefill_tokens"] > sum(20 + i for i in range(8)), "preempted sequences are computed again"
        assert stats["groups"][0]["peak_held"] <= groups[0].table_width
        assert_all_free(loop)


def test_a_prompt_is_admitted_only_when_its_blocks_are_free() -> None:
    step = FakeStep([Group(None, 12, 24)])  # each request needs eleven, so none may start beside another
    with running(step) as loop:
        for sequence_id in [loop.submit(greedy(prompt_of(40, i), 4)) for i in range(4)]:
            assert len(ids_of(collect(loop, sequence_id))) == 4
        stats = loop.stats()
        assert (stats["num_preemptions"], stats["num_prefill_tokens"]) == (0, 4 * 40), "nothing is computed twice"


def test_no_more_sequences_run_than_a_step_has_rows_for() -> None:
    step = FakeStep(two_groups(64))
    gate = Gate(step)
    with running(step, run=gate.run, max_logits_rows=2) as loop:
        ids = [loop.submit(greedy(prompt_of(5, i), 3)) for i in range(5)]
        gate.hold_after(1)  # the second step begins with every request known
        assert (loop.stats()["num_running"], loop.stats()["num_waiting"]) == (2, 3)
        gate.go.release(1000)
        for sequence_id in ids:
            collect(loop, sequence_id)
        assert max(rows for _, rows in step.steps) == 2


def test_a_window_never_holds_more_than_its_ring() -> None:
    groups = [Group(WINDOW, 50, ring_width(WINDOW, 1, MAX_SEQ_LEN))]
    step = FakeStep(groups)
    with running(step, max_step_tokens=32) as loop:  # a ring narrower than the step: chunks shrink to it
        events = collect(loop, loop.submit(greedy(prompt_of(60), 36)))
        assert ids_of(events) == expected_greedy(prompt_of(60), 36, groups)
        # Ten keys that begin anywhere touch at most four pages of four.
        assert loop.stats()["groups"] == [{"num_blocks": 50, "num_free": 50, "peak_held": 4}]


def test_logits_and_logprobs_of_every_prompt_token() -> None:
    ring, whole = two_groups(7)
    groups = [ring, Group(None, 34, whole.table_width)]  # too little for both: the second is preempted on the way
    step = FakeStep(groups)
    prompts = [prompt_of(50, 1), prompt_of(45, 2)]
    outs = [np.full((len(prompt), VOCAB_SIZE), np.nan, np.float32) for prompt in prompts]
    with running(step, max_step_tokens=7, max_logits_rows=5) as loop:
        ids = [
            loop.submit(greedy(prompt, 40, logits_out=out, num_prompt_logprobs=3, num_logprobs=2))
            for prompt, out in zip(prompts, outs, strict=True)
        ]
        for prompt, out, sequence_id in zip(prompts, outs, ids, strict=True):
            events = collect(loop, sequence_id)
            exact = np.stack([expected_logits(prompt[: i + 1], groups, False) for i in range(len(prompt))])
            np.testing.assert_array_equal(out, exact)
            rows = [row for event in events for row in event.prompt_logprobs]
            assert [row.token_id for row in rows] == prompt[1:]
            for logits, row in zip(exact[:-1].astype(np.float64), rows, strict=True):
                logprobs = logits - np.log(np.exp(logits).sum())
                assert row.logprob == pytest.approx(logprobs[row.token_id], abs=2e-6)
                best = np.argsort(-logits, kind="stable")[:3]
                assert [token for token, _ in row.top] == best.tolist()
                assert [value for _, value in row.top] == pytest.approx(logprobs[best].tolist(), abs=2e-6)
            new = expected_greedy(prompt, 40, groups)
            assert ids_of(events) == new
            for event in events:
                if event.token_id is not None:
                    assert event.logprob is not None
                    assert event.logprob.top[0] == (event.token_id, event.logprob.logprob)
        assert loop.stats()["num_preemptions"] > 0
        assert max(rows for _, rows in step.steps) == 5


def test_prompt_only_requests_end_with_length() -> None:
    step = FakeStep([Group(None, 24, 24)])
    with running(step, max_step_tokens=8) as loop:
        (event,) = collect(loop, loop.submit(greedy([5], 0, num_prompt_logprobs=0)))
        assert (event.token_id, event.prompt_logprobs, event.finish_reason) == (None, [], "length")
        events = collect(loop, loop.submit(greedy(prompt_of(MAX_SEQ_LEN), 5)))
        assert (ids_of(events), events[-1].finish_reason) == ([], "length"), "a full context has no room for a token"
        events = collect(loop, loop.submit(greedy(prompt_of(MAX_SEQ_LEN - 2), 5)))
        assert (len(ids_of(events)), events[-1].finish_reason) == (2, "length")


def test_cancel_running_and_waiting() -> None:
    groups = two_groups(64)
    step = FakeStep(groups)
    gate = Gate(step)
    with running(step, run=gate.run, max_running=2) as loop:
        first, second, third = (loop.submit(greedy(prompt_of(9, i), 20)) for i in range(3))
        assert gate.entered.acquire(timeout=10)
        while loop.stats()["num_waiting"] + loop.stats()["num_running"] < 3:
            time.sleep(0.001)
        loop.cancel(first)
        loop.cancel(third)
        loop.cancel(12345)
        gate.go.release(1000)
        for sequence_id in (first, third):
            last = collect(loop, sequence_id)[-1]
            assert (last.finish_reason, last.token_id, last.message) == ("cancelled", None, "cancelled")
        assert ids_of(collect(loop, second)) == expected_greedy(prompt_of(9, 1), 20, groups)
        assert_all_free(loop)
        with pytest.raises(RequestError, match="last event was collected"):
            loop.wait(first, 1)


def test_forget_frees_the_blocks_and_the_mailbox() -> None:
    step = FakeStep(two_groups(64))
    with running(step) as loop:
        sequence_id = loop.submit(greedy(prompt_of(9), 80))
        loop.forget(sequence_id)
        with pytest.raises(RequestError, match="no events"):
            loop.wait(sequence_id, 1)
        deadline = time.monotonic() + 10
        while loop.stats()["num_running"] + loop.stats()["num_waiting"] and time.monotonic() < deadline:
            time.sleep(0.001)
        assert_all_free(loop)
        assert len(ids_of(collect(loop, loop.submit(greedy([1], 5))))) == 5


def test_a_strided_array_is_read_right() -> None:
    def run(batch: StepBatch) -> NDArray[np.float32]:
        return np.asfortranarray(np.repeat(successor(batch), 2, axis=1))[:, ::2]

    with running(FakeStep([Group(None, 24, 24)]), run=run) as loop:
        assert ids_of(collect(loop, loop.submit(greedy([1], 3)))) == [2, 3, 4]


def test_the_batch_is_read_only_and_outlives_its_step() -> None:
    kept: list[StepBatch] = []

    def run(batch: StepBatch) -> NDArray[np.float32]:
        kept.append(batch)
        with pytest.raises(ValueError, match="read-only"):
            batch.token_ids[0] = 1
        return successor(batch)

    with running(FakeStep([Group(None, 24, 24)]), run=run) as loop:
        collect(loop, loop.submit(greedy([1, 2], 3)))
    assert [batch.token_ids.tolist() for batch in kept] == [[1, 2], [3], [4]]
    assert all(array.dtype == np.int32 for array in (kept[0].positions, kept[0].block_table[0], kept[0].state_slot))


def test_submit_and_wait_from_eight_threads() -> None:
    groups = two_groups(16, sequences=3)
    step = FakeStep(groups)
    failures: list[str] = []

    def stream(thread: int) -> None:
        for i in range(4):
            prompt = prompt_of(5 + 3 * thread + i, thread)
            ids = ids_of(collect(loop, loop.submit(greedy(prompt, 20))))
            if ids != expected_greedy(prompt, 20, groups):
                failures.append(f"thread {thread}, request {i}: {ids}")

    with running(step, max_step_tokens=16) as loop:
        threads = [threading.Thread(target=stream, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_all_free(loop)
    assert failures == []


def test_wait_times_out_and_refuses_nonsense() -> None:
    step = FakeStep(two_groups(64))
    gate = Gate(step)
    with running(step, run=gate.run) as loop:
        sequence_id = loop.submit(greedy([1], 1))
        started = time.monotonic()
        assert loop.wait(sequence_id, 0.15) == []
        assert 0.14 < time.monotonic() - started < 5
        for timeout_s in (-1.0, float("nan")):
            with pytest.raises(RequestError, match="timeout_s"):
                loop.wait(sequence_id, timeout_s)
        gate.go.release(10)
        assert len(collect(loop, sequence_id)) == 1


def test_an_idle_loop_sleeps() -> None:
    with running(FakeStep(two_groups(64))) as loop:
        collect(loop, loop.submit(greedy([1], 5)))
        cpu_s = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - cpu_s < 0.1
        assert loop.stats()["last_step_age_s"] >= 0.3
