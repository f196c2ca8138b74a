"""Builds a StepBatch by hand, for the reference run alone: with a ContiguousCache, no scheduler."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma2_fast.engine.step_batch import Ints, StepBatch


def flat_batch(
    tokens: Sequence[Sequence[int]],
    context_tokens: Sequence[int],
    *,
    block_table: tuple[Ints, ...] = (),
    state_slot: Sequence[int] = (),
    state_copies: Sequence[tuple[int, int]] = (),
    logits_token: Sequence[int] | None = None,
) -> StepBatch:
    """The next tokens of S sequences that have `context_tokens` in the cache. A sequence may have none in this step.

    logits_token: the tokens whose logits are wanted; None for every one.
    """
    if len(tokens) != len(context_tokens):
        raise ValueError(f"flat_batch: {len(tokens)} sequences of tokens, but {len(context_tokens)} context lengths")
    first_token = np.cumsum([0, *(len(new) for new in tokens)], dtype=np.int32)
    spans = [np.arange(start, start + len(new)) for new, start in zip(tokens, context_tokens, strict=True)]
    return StepBatch(
        token_ids=np.array([token for new in tokens for token in new], dtype=np.int32),
        positions=np.concatenate([np.zeros(0), *spans]).astype(np.int32),
        first_token=first_token,
        context_tokens=np.array(context_tokens, dtype=np.int32),
        block_table=block_table,
        state_slot=np.array(state_slot, dtype=np.int32),
        state_copies=np.array(state_copies, dtype=np.int32).reshape(-1, 2),
        logits_token=np.array(range(first_token[-1]) if logits_token is None else logits_token, dtype=np.int32),
    )
