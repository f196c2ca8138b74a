"""A decode loop over a step on the imagined GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.engine import core_cache_plan
from tests.cuda.models import SmallModel
from tests.support.tiny_models import TinyModel

Floats = NDArray[np.float32]


class Loop:
    """step: of the model, with the cache of the plan. `with` closes the loop."""

    def __init__(self, step: _core.ModelStep, model: SmallModel | TinyModel, plan: CachePlan) -> None:
        self.vocab_size = model.spec.vocab_size
        limits = _core.Limits(
            max_running_sequences=plan.max_sequences,
            max_step_tokens=plan.max_step_tokens,
            max_seq_len=plan.max_seq_len,
            max_logits_rows=plan.max_step_tokens,
            vocab_size=self.vocab_size,
            final_softcap=model.spec.final_softcap,
        )
        self.loop = _core.DecodeLoop(step, core_cache_plan(plan), limits)

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.close()

    def logits(self, token_ids: list[int]) -> Floats:
        out = np.full((len(token_ids), self.vocab_size), np.nan, np.float32)
        self.finish(self.submit(token_ids, max_tokens=0, logits_out=out))
        return out

    def submit(
        self, token_ids: list[int], logits_out: Floats | None = None, logprobs: bool = False, **sampling: Any
    ) -> int:
        return self.loop.submit(
            _core.Request(
                token_ids=token_ids,
                sampling=_core.SamplingParams(**sampling),
                logits_out=logits_out,
                num_logprobs=0 if logprobs else None,
            )
        )

    def events(self, sequence: int) -> list[_core.TokenEvent]:
        events: list[_core.TokenEvent] = []
        while not events or events[-1].finish_reason is None:
            events += self.loop.wait(sequence, 120.0)
        return events

    def finish(self, sequence: int) -> list[_core.TokenEvent]:
        events = self.events(sequence)
        assert events[-1].finish_reason == "length", events[-1].message
        return events

    def tokens(self, sequence: int) -> list[int]:
        return [event.token_id for event in self.finish(sequence) if event.token_id is not None]
