"""CTranslate2 on a converted model. Its Gemma 2 leaves out the soft caps and the window: an anchor for speed alone."""

from __future__ import annotations

import time
from typing import Any

import ctranslate2
import numpy as np


class CTranslate2:
    """A converted directory whose pieces are called t0, t1 … settings: model, threads, options (compute_type)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.versions = {"ctranslate2": ctranslate2.__version__}
        options = {"compute_type": "int8_float32", **settings["options"]}
        self._generator = ctranslate2.Generator(
            settings["model"], device="cpu", intra_threads=settings["threads"], inter_threads=1, **options
        )
        self._rng = np.random.default_rng(0)

    def prefill(self, tokens: int) -> float:
        return self._seconds(1, tokens, 1)

    def decode(self, batch: int, context: int, steps: int) -> float:
        """The steps alone cannot be timed: what the prompt and one token take is taken off."""
        return self._seconds(batch, context, steps + 1) - self._seconds(batch, context, 1)

    def _seconds(self, batch: int, context: int, new_tokens: int) -> float:
        prompts = [[f"t{i}" for i in self._rng.integers(300, 200_000, context)] for _ in range(batch)]
        start = time.perf_counter()
        self._generator.generate_batch(
            prompts,
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
        )
        return time.perf_counter() - start


def load(settings: dict[str, Any]) -> CTranslate2:
    return CTranslate2(settings)
