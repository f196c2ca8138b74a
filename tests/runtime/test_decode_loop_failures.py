"""Damaged logits, steps that fail, and the end of the loop and of its process."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.errors import BackendError

from .fake_step import (
    DAMAGED,
    FAILING,
    VOCAB_SIZE,
    FakeStep,
    Group,
    collect,
    expected_greedy,
    ids_of,
    prompt_of,
)
from .loops import Gate, assert_all_free, greedy, running, successor, two_groups


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
            assert last.message is not None
            assert "NaN or +inf" in last.message
        assert ids_of(collect(loop, good)) == expected_greedy(prompt_of(9), 20, groups)
        assert_all_free(loop)


@pytest.mark.parametrize(("value", "reason"), [(np.inf, "error"), (-np.inf, "length"), (np.nan, "error")])
@pytest.mark.parametrize("token", [0, 5, 18, 77, VOCAB_SIZE - 1])
def test_one_odd_value_in_a_row(value: float, reason: str, token: int) -> None:
    def run(batch: StepBatch) -> NDArray[np.float32]:
        logits = successor(batch)
        logits[:, token] = value
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
        assert last.message is not None
        assert "ValueError: a token that this step cannot take" in last.message
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
def test_a_callable_that_returns_something_else(returned: Any, described: str) -> None:
    with running(FakeStep([Group(None, 24, 24)]), run=lambda batch: returned) as loop:
        last = collect(loop, loop.submit(greedy([1], 5)))[-1]
        assert last.message is not None
        assert "float32 numpy array of shape (1, 97)" in last.message
        assert f"returned {described}" in last.message


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


def test_a_loop_collected_inside_its_own_step_does_not_end_the_process() -> None:
    """Python may collect a cycle that holds the loop while the loop's thread runs a callback; it cannot join itself."""
    script = """
        import gc, threading
        import numpy as np
        from gemma2_fast import _core

        class Holder:
            pass

        dropped, collected = threading.Event(), threading.Event()

        def run(batch):
            dropped.wait()
            gc.collect()
            collected.set()
            return np.zeros((len(batch.logits_token), 8), np.float32)

        holder = Holder()
        holder.me = holder
        holder.loop = _core.DecodeLoop(
            _core.CallbackStep(run),
            _core.CachePlan(page_tokens=4, paged=[]),
            _core.Limits(max_running_sequences=1, max_step_tokens=4, max_seq_len=10, max_logits_rows=4, vocab_size=8),
        )
        gc.disable()
        holder.loop.submit(_core.Request(token_ids=[1], sampling=_core.SamplingParams(max_tokens=2)))
        del holder
        dropped.set()
        print(collected.wait(20))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr
