"""The reference as a backend of the C++ decode loop."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.reference.cache import PagedCache
from gemma2_fast.reference.model import ReferenceModel


class ReferenceStep:
    """One step of a model over a paged cache of its own, laid out by `plan` and kept in the plan's kv_dtype.

    `run` is what `_core.CallbackStep` calls.
    """

    def __init__(self, model: ReferenceModel, plan: CachePlan) -> None:
        self._model = model
        self._cache = PagedCache(plan)

    def run(self, batch: StepBatch) -> NDArray[np.float32]:
        """Next-token logits before the final soft cap, float32 [L, V]."""
        logits = self._model.uncapped_logits(batch, self._cache)
        return np.ascontiguousarray(logits.to(torch.float32).numpy())
