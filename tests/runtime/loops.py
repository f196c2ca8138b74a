"""Decode loops over a FakeStep, and the steps and requests that the tests put to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.step_batch import StepBatch

from .fake_step import (
    PAGE_TOKENS,
    VOCAB_SIZE,
    FakeStep,
    Group,
    ring_width,
)

Choose = Callable[[NDArray[np.float32], list[tuple[_core.SamplingParams, int]]], Sequence[int]]

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
    chooses: bool = False,
    choose: Choose | None = None,
) -> Iterator[_core.DecodeLoop]:
    limits = _core.Limits(
        max_running_sequences=max_running,
        max_step_tokens=max_step_tokens,
        max_seq_len=MAX_SEQ_LEN,
        max_logits_rows=max_logits_rows,
        vocab_size=VOCAB_SIZE,
    )
    core_step = _core.CallbackStep(run or step.run, choose or (step.choose if chooses else None))
    loop = _core.DecodeLoop(core_step, step.plan(), limits)
    try:
        yield loop
    finally:
        loop.close()
    assert step.faults == []


def greedy(prompt: Sequence[int], max_tokens: int, **options: Any) -> _core.Request:
    return _core.Request(token_ids=prompt, sampling=_core.SamplingParams(max_tokens=max_tokens), **options)


def assert_all_free(loop: _core.DecodeLoop) -> None:
    stats = loop.stats()
    assert [group["num_free"] for group in stats["groups"]] == [group["num_blocks"] for group in stats["groups"]]
    assert stats["num_running"] == stats["num_waiting"] == 0


def successor(batch: StepBatch) -> NDArray[np.float32]:
    """After token t comes t + 1."""
    logits = np.zeros((len(batch.logits_token), VOCAB_SIZE), np.float32)
    logits[np.arange(len(logits)), batch.token_ids[batch.logits_token] + 1] = 5
    return logits


class Gate:
    """Lets a test hold the loop inside a step."""

    def __init__(self, step: FakeStep) -> None:
        self.step, self.entered, self.go = step, threading.Semaphore(0), threading.Semaphore(0)

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        self.entered.release()
        assert self.go.acquire(timeout=10)
        return self.step.run(batch)

    def hold_after(self, steps: int) -> None:
        """Waits until so many steps have run and the loop is inside the next."""
        self.go.release(steps)
        for _ in range(steps + 1):
            assert self.entered.acquire(timeout=10)
