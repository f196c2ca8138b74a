"""The decode loop over a fake step: batching, chunks, preemption, cancellation, failures."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.errors import BackendError, CapacityError, RequestError

from .fake_step import (
    DAMAGED,
    FAILING,
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

MAX_SEQ_LEN = 96
WINDOW = 10


def two_groups(max_step_tokens: int, sequences: float = 8) -> list[Group]:
    """A windowed and a global group, as Gemma 2 has, with room for this many full sequences."""
    ring, whole = ring_width(WINDOW, max_step_tokens, MAX_SEQ_LEN), MAX_SEQ_LEN // PAGE_TOKENS
    return [Group(WINDOW, int(ring * sequences), ring), Group(None, int(whole * sequences), whole)]


@contextmanager
def running(
    step: FakeStep,
    *,
    max_running: int = 8,
    max_step_tokens: int = 64,
    max_logits_rows: int = 64,
    run: Callable[[StepBatch], NDArray[np.float32]] | None = None,
) -> Iterator[_core.DecodeLoop]:
    limits = _core.Limits(
        max_running_sequences=max_running,
        max_step_tokens=max_step_tokens,
        max_seq_len=MAX_SEQ_LEN,
        max_logits_rows=max_logits_rows,
        vocab_size=VOCAB_SIZE,
    )
    loop = _core.DecodeLoop(_core.CallbackStep(run or step.run), step.plan(), limits)
    try:
        yield loop
    finally:
        loop.close()
    assert step.faults == []


def greedy(prompt: Sequence[int], max_tokens: int, **options: object) -> _core.Request:
    return _core.Request(token_ids=prompt, sampling=_core.SamplingParams(max_tokens=max_tokens), **options)  # type: ignore[arg-type]


def assert_all_free(loop: _core.DecodeLoop) -> None:
    stats = loop.stats()
    assert [group["num_free"] for group in stats["groups"]] == [group["num_blocks"] for group in stats["groups"]]
    assert stats["num_running"] == stats["num_waiting"] == 0


def successor(batch: StepBatch) -> NDArray[np.float32]:
    """After token t comes t + 1."""
    logits = np.zeros((len(batch.logits_token), VOCAB_SIZE), np.float32)
    logits[np.arange(len(logits)), batch.token_ids[batch.logits_token] + 1] = 5
    return logits


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


@pytest.mark.parametrize("max_step_tokens", [1, 7, 64, MAX_SEQ_LEN])
@pytest.mark.parametrize("length", [1, PAGE_TOKENS, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 61])
def test_chunks_do_not_change_the_ids(length: int, max_step_tokens: int) -> None:
    groups = two_groups(max_step_tokens, sequences=1)
    step = FakeStep(groups, num_slots=1)
    with running(step, max_step_tokens=max_step_tokens) as loop:
        events = collect(loop, loop.submit(greedy(prompt_of(length), 35)))
        assert ids_of(events) == expected_greedy(prompt_of(length), 35, groups, recurrent=True)
        assert max(tokens for tokens, _ in step.steps) == min(length, max_step_tokens)
        assert loop.stats()["num_preemptions"] == 0
        assert_all_free(loop)


@pytest.mark.parametrize("max_step_tokens", [3, 7, 64])
def test_a_ragged_batch_gives_the_ids_of_single_runs(max_step_tokens: int) -> None:
    groups = two_groups(max_step_tokens)
    step = FakeStep(groups, num_slots=5)
    lengths = [1, 40, 3, 23, 1, 11, 60, 17]
    with running(step, max_step_tokens=max_step_tokens) as loop:
        ids = [loop.submit(greedy(prompt_of(n, i), 30)) for i, n in enumerate(lengths)]
        for i, (sequence_id, n) in enumerate(zip(ids, lengths, strict=True)):
            events = collect(loop, sequence_id)
            assert ids_of(events) == expected_greedy(prompt_of(n, i), 30, groups, recurrent=True)
        assert max(tokens for tokens, _ in step.steps) <= max_step_tokens
        assert_all_free(loop)


def test_a_pool_for_two_of_eight() -> None:
    groups = two_groups(16, sequences=2)
    step = FakeStep(groups, num_slots=8)
    with running(step, max_step_tokens=16) as loop:
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
                    assert event.logprob is not None and event.logprob.top[0] == (event.token_id, event.logprob.logprob)
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


class Gate:
    """Lets a test hold the loop inside a step."""

    def __init__(self, step: FakeStep) -> None:
        self.step, self.entered, self.go = step, threading.Semaphore(0), threading.Semaphore(0)

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        self.entered.release()
        assert self.go.acquire(timeout=10)
        return self.step.run(batch)


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
    with running(FakeStep(two_groups(64))) as loop:
        with pytest.raises(RequestError, match=message):
            sampling = _core.SamplingParams(
                **{"max_tokens": 8} | {k: v for k, v in options.items() if k not in fields}  # type: ignore[arg-type]
            )
            request = {"token_ids": [1]} | {k: v for k, v in options.items() if k in fields}
            loop.submit(_core.Request(sampling=sampling, **request))  # type: ignore[arg-type]
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


def test_nan_in_one_row_ends_that_request_only() -> None:
    groups = two_groups(64)
    step = FakeStep(groups)
    gate = Gate(step)
    with running(step, run=gate.run) as loop:
        good = loop.submit(greedy(prompt_of(9), 20))
        bad = loop.submit(greedy([3, DAMAGED, 4], 20))
        scored = loop.submit(greedy([3, DAMAGED, 4], 0, num_prompt_logprobs=0))
        gate.go.release(1000)
        for sequence_id in (bad, scored):
            last = collect(loop, sequence_id)[-1]
            assert last.finish_reason == "error"
            assert last.message is not None and "NaN or +inf" in last.message
        assert ids_of(collect(loop, good)) == expected_greedy(prompt_of(9), 20, groups)
        assert_all_free(loop)


@pytest.mark.parametrize(("value", "reason"), [(np.inf, "error"), (-np.inf, "length"), (np.nan, "error")])
def test_one_odd_value_in_a_row(value: float, reason: str) -> None:
    def run(batch: StepBatch) -> NDArray[np.float32]:
        logits = successor(batch)
        logits[:, -1] = value
        return logits

    with running(FakeStep([Group(None, 24, 24)]), run=run) as loop:
        assert collect(loop, loop.submit(greedy([1], 3)))[-1].finish_reason == reason


def test_a_row_without_any_token() -> None:
    def run(batch: StepBatch) -> NDArray[np.float32]:
        return np.full((len(batch.logits_token), VOCAB_SIZE), -np.inf, np.float32)

    with running(FakeStep([Group(None, 24, 24)]), run=run) as loop:
        assert collect(loop, loop.submit(greedy([1], 3)))[-1].finish_reason == "error"


def test_a_step_that_raises_ends_its_sequences_and_the_loop_lives_on() -> None:
    step = FakeStep(two_groups(64))
    with running(step) as loop:
        last = collect(loop, loop.submit(greedy([1, FAILING], 5)))[-1]
        assert last.finish_reason == "error"
        assert last.message is not None and "ValueError: a token that this step cannot take" in last.message
        assert_all_free(loop)
        assert len(ids_of(collect(loop, loop.submit(greedy([1], 5))))) == 5


@pytest.mark.parametrize(
    ("returned", "described"),
    [
        (None, "a NoneType"),
        ([[0.0] * VOCAB_SIZE], "a list"),
        (np.zeros((1, VOCAB_SIZE)), "float64 (1, 97)"),
        (np.zeros((1, VOCAB_SIZE - 1), np.float32), "float32 (1, 96)"),
        (np.zeros((2, VOCAB_SIZE), np.float32), "float32 (2, 97)"),
        (np.zeros(VOCAB_SIZE, np.float32), "float32 (97,)"),
    ],
)
def test_a_callable_that_returns_something_else(returned: object, described: str) -> None:
    with running(FakeStep([Group(None, 24, 24)]), run=lambda batch: returned) as loop:  # type: ignore[arg-type,return-value]
        last = collect(loop, loop.submit(greedy([1], 5)))[-1]
        assert last.message is not None and "float32 numpy array of shape (1, 97)" in last.message
        assert f"returned {described}" in last.message


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


def test_close_while_busy() -> None:
    step = FakeStep(two_groups(64))
    with running(step, max_running=2) as loop:
        ids = [loop.submit(greedy(prompt_of(9, i), 80)) for i in range(4)]
        loop.close()
        loop.close()
        for sequence_id in ids:
            assert collect(loop, sequence_id)[-1].finish_reason in ("cancelled", "length")
        assert_all_free(loop)
        with pytest.raises(BackendError, match="closed"):
            loop.submit(greedy([1], 1))


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


SCRIPT = """
    import os, signal, sys, threading, time
    import numpy as np
    from gemma2_fast import _core

    def run(batch):
        time.sleep(0.02)
        return np.zeros((len(batch.logits_token), 9), np.float32)

    group = _core.PagedKvGroup(
        layers=[0], num_kv_heads=1, head_dim=1, window_keys=None, num_blocks=4096, table_width=4096)
    limits = _core.Limits(
        max_running_sequences=1, max_step_tokens=8, max_seq_len=9999, max_logits_rows=1, vocab_size=9)
    loop = _core.DecodeLoop(_core.CallbackStep(run), _core.CachePlan(page_tokens=4, paged=[group]), limits)
    first, second = (
        loop.submit(_core.Request(token_ids=[1], sampling=_core.SamplingParams(max_tokens=9000))) for _ in range(2))
"""


@pytest.mark.parametrize(
    ("ending", "printed"),
    [
        ("threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\nloop.wait(second)", "KeyboardInterrupt"),
        ("print('left the loop busy')", "left the loop busy"),
        ("del loop\nprint('deleted the loop busy')", "deleted the loop busy"),
    ],
    ids=["ctrl-c", "exit", "delete"],
)
def test_a_process_ends_whatever_the_loop_is_doing(ending: str, printed: str) -> None:
    script = textwrap.dedent(SCRIPT) + ending
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert printed in done.stdout + done.stderr
    assert done.returncode in (0, 1, -2, 130)
