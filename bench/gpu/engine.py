"""The whole engine on a GPU with random weights: from_pretrained's own path, from the plan to the decode loop."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.engine import start_engine
from gemma2_fast.engine.options import EngineOptions, EnginePlan, plan_engine
from gemma2_fast.errors import BackendError
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.tensor import Tensor

TIMEOUT_SECONDS = 120.0  # without a token
COMPARED_TOKENS = 20  # the likeliest
LARGEST_DIFFERENCE = 0.25  # of a log-probability, between two ways to compute it in bfloat16
LEAST_COMMON = COMPARED_TOKENS // 2


@dataclass(frozen=True)
class Sizes:
    """Of an engine; max_step_tokens None: what the engine itself chooses."""

    max_seq_len: int
    max_batch: int = 1
    max_step_tokens: int | None = None


class GpuEngine:
    """`with` frees the GPU's memory again."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], sizes: Sizes) -> None:
        options = EngineOptions(
            backend="cuda",
            max_seq_len=sizes.max_seq_len,
            max_batch_size=sizes.max_batch,
            max_step_tokens=sizes.max_step_tokens,
        )
        self.spec = spec
        self.plan: EnginePlan = plan_engine(spec, matrix_formats(weights), options)
        self._loop: _core.DecodeLoop | None = start_engine(self.plan, weights)
        self._rng = np.random.default_rng(0)

    def __enter__(self) -> GpuEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loop is not None:
            self._loop.close()
        self._loop = None

    def prefill(self, tokens: int) -> float:
        """Seconds from the request to its first token."""
        return self._first_token(self.random_ids(tokens), None)[1]

    def decode(self, context: int, steps: int, batch: int = 1) -> list[float]:
        """Seconds of at least so many steps after `context` tokens: between tokens of the sequence that started last,
        while all were running. BackendError where they did not run together."""
        events = self._together([self.random_ids(context) for _ in range(batch)], steps)
        last = max(events, key=lambda some: some[0].time_ns)
        end = min(some[-1].time_ns for some in events)
        times = [event.time_ns for event in last if event.time_ns <= end]
        if len(times) <= steps:
            raise BackendError(f"{batch} sequences ran {len(times) - 1} steps together, {steps} were wanted")
        return [(later - earlier) / 1e9 for earlier, later in itertools.pairwise(times)]

    def head_start(self, context: int, batch: int) -> int:
        """Tokens that the first of a batch may have before the last has its prompt behind it: when a request comes, one
        step is under way and one ahead of it."""
        return 0 if batch == 1 else batch * (context // self.plan.cache.max_step_tokens + 2)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Of every token of a prompt, with the cap."""
        out = np.full((len(ids), self.spec.vocab_size), np.nan, np.float32)
        self._events(self._submit(ids, max_tokens=0, logits_out=out))
        return out

    def check_decode(self, context: int, steps: int, batch: int = 1) -> float:
        """How far what decode steps say of the last token, of a batch's first and last sequence, is from what a prompt
        of the same tokens says: the largest difference of log-probabilities. BackendError where that is more than
        rounding, or where one sequence alone has other tokens when the device chooses them, as it does when timed."""
        prompts = [self.random_ids(context) for _ in range(batch)]
        checked = {0, batch - 1}
        events = self._together(prompts, steps, checked)
        if batch == 1 and _token_ids(self._together(prompts, steps)[0]) != _token_ids(events[0]):
            raise BackendError(f"after {context} tokens the device chooses other tokens than the host")
        return max(self._difference(prompts[index], events[index]) for index in checked)

    def _difference(self, prompt: list[int], events: Sequence[_core.TokenEvent]) -> float:
        steps, stepwise = len(events), _top(events[-1])
        at_once = _top(self._first_token(prompt + _token_ids(events)[:-1], COMPARED_TOKENS)[0])
        common = stepwise.keys() & at_once.keys()
        difference = max((abs(stepwise[i] - at_once[i]) for i in common), default=float("nan"))
        if len(common) < LEAST_COMMON or not difference <= LARGEST_DIFFERENCE:
            raise BackendError(
                f"after {len(prompt)} tokens and {steps} steps the likeliest tokens are not those of one prompt: "
                f"{len(common)} of {COMPARED_TOKENS} in common (at least {LEAST_COMMON}), log-probabilities up to "
                f"{difference:.2g} apart (at most {LARGEST_DIFFERENCE})"
            )
        return difference

    def random_ids(self, count: int) -> list[int]:
        return [int(i) for i in self._rng.integers(3, self.spec.vocab_size, count)]

    def _first_token(self, ids: Sequence[int], num_logprobs: int | None) -> tuple[_core.TokenEvent, float]:
        """And the seconds until it was there. The prompt is new, and nothing of it in the cache."""

        start = time.monotonic_ns()
        event = self._events(self._submit(ids, max_tokens=1, num_logprobs=num_logprobs))[0]
        return event, (event.time_ns - start) / 1e9

    def _together(
        self, prompts: Sequence[Sequence[int]], steps: int, with_logprobs: Collection[int] = ()
    ) -> list[list[_core.TokenEvent]]:
        """Events of sequences that are to run so many steps together, some of them with log-probabilities."""
        max_tokens = steps + 1 + self.head_start(len(prompts[0]), len(prompts))
        sequences = [
            self._submit(prompt, max_tokens, COMPARED_TOKENS if index in with_logprobs else None)
            for index, prompt in enumerate(prompts)
        ]
        return [self._events(sequence) for sequence in sequences]

    def _submit(
        self,
        ids: Sequence[int],
        max_tokens: int,
        num_logprobs: int | None = None,
        logits_out: NDArray[np.float32] | None = None,
    ) -> int:
        sampling = _core.SamplingParams(max_tokens=max_tokens)
        request = _core.Request(token_ids=ids, sampling=sampling, num_logprobs=num_logprobs, logits_out=logits_out)
        return self._running().submit(request)

    def _events(self, sequence: int) -> list[_core.TokenEvent]:
        """All of a sequence. BackendError where it does not end as it should."""
        events: list[_core.TokenEvent] = []
        while not events or events[-1].finish_reason is None:
            new = self._running().wait(sequence, TIMEOUT_SECONDS)
            if not new:
                raise BackendError(f"the engine gave no token for {TIMEOUT_SECONDS:.0f} seconds")
            events += new
        if events[-1].finish_reason != "length":
            raise BackendError(f"a sequence ended with {events[-1].finish_reason!r}: {events[-1].message}")
        return events

    def _running(self) -> _core.DecodeLoop:
        if self._loop is None:
            raise BackendError("the engine is closed")
        return self._loop


def matrix_formats(weights: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Of the matrices, most bytes first, as plan_engine takes them."""
    num_bytes: dict[str, int] = {}
    for tensor in weights.values():
        if len(tensor.shape) > 1:
            num_bytes[tensor.format.name] = num_bytes.get(tensor.format.name, 0) + tensor.num_bytes
    return tuple(sorted(num_bytes, key=lambda name: -num_bytes[name]))


def _token_ids(events: Sequence[_core.TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def _top(event: _core.TokenEvent) -> dict[int, float]:
    if event.logprob is None:
        raise BackendError("the engine gave no log-probabilities")
    return dict(event.logprob.top)
