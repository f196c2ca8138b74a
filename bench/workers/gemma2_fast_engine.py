"""This package, through its public face alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np

import gemma2_fast
from gemma2_fast import Generator
from gemma2_fast.errors import TokenizerError

GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


class Gemma2Fast:
    """settings: model, threads, max_batch, max_context, options (keywords of from_pretrained)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.versions = {"gemma2_fast": gemma2_fast.__version__}
        self._generator = Generator.from_pretrained(
            settings["model"],
            num_threads=settings["threads"],
            max_batch_size=settings["max_batch"],
            max_seq_len=settings["max_context"],
            progress=False,
            **settings["options"],
        )
        self._rng = np.random.default_rng(0)

    def prefill(self, tokens: int) -> float:
        """Sampling the first token is part of it."""
        result = self._generator.generate(self._random(tokens), max_tokens=1, **GREEDY)
        return float(result.timings.prefill_ms) / 1000

    def decode(self, batch: int, context: int, steps: int) -> float:
        """The sequence that starts last is timed: from its first token to its last, all the others run as well."""
        cache = self._generator.plan.cache
        most = cache.max_seq_len - context
        if batch > 1 and most <= steps + batch * (context // cache.max_step_tokens + 1):
            raise ValueError(f"{most} tokens are not enough for {batch} sequences to make {steps} steps together")
        with ExitStack() as others:
            for _ in range(batch - 1):
                prompt = self._random(context)
                others.enter_context(self._generator.stream(prompt, max_tokens=most, **GREEDY))
            result = self._generator.generate(self._random(context), max_tokens=steps + 1, **GREEDY)
        return float(result.timings.decode_ms) / 1000

    def begin(self, context: int, steps: int) -> None:
        self._running: Iterator[object] = self._generator.stream(self._random(context), max_tokens=1 + steps, **GREEDY)
        next(self._running)
        self._read_until = time.perf_counter()

    def advance(self, steps: int) -> float:
        for _ in range(steps):
            next(self._running)
        before, self._read_until = self._read_until, time.perf_counter()
        return self._read_until - before

    def likeliest(self, ids: list[int]) -> list[tuple[int, float]]:
        logits = self._generator.logits(ids)[-1]
        return [(int(token_id), float(logits[token_id])) for token_id in np.argsort(-logits)[:5]]

    def encode(self, text: str) -> list[int]:
        """Its ids; of a checkpoint without a tokenizer, as with random weights, a drawn id for each word."""
        try:
            return list(self._generator.tokenizer.encode(text))
        except TokenizerError:
            return self._random(len(text.split()))

    def _random(self, tokens: int) -> list[int]:
        most = min(200_000, self._generator.spec.vocab_size)
        return [int(token_id) for token_id in self._rng.integers(min(300, most // 2), most, tokens)]


def load(settings: dict[str, Any]) -> Gemma2Fast:
    return Gemma2Fast(settings)
