"""One step's work, as the C++ scheduler hands it to a backend. Same fields as csrc/runtime/step_batch.h."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

NO_BLOCK = -1  # fills block-table entries that no visible key lives in; never read


@dataclass(frozen=True)
class StepBatch:
    """S sequences with T new tokens in all, flat.

    token_ids [T]; positions [T], consecutive within a sequence, from context_tokens[s];
    first_token [S + 1], offsets of each sequence's tokens; context_tokens [S], tokens already in the cache;
    block_table per paged group [S, table_width]: logical block b = position // page_tokens of a sequence stands in
    column b % table_width; state_slot [S], or empty without recurrent layers; state_copies [C, 2], slots from and to,
    carried out in order before any token is computed: a copy from a sequence's slot keeps its state as it was before
    this step, a copy to it lets the sequence go on from another state, that of its first context_tokens tokens;
    logits_token [L], ascending indices into token_ids whose next-token logits are wanted.
    """

    token_ids: Ints
    positions: Ints
    first_token: Ints
    context_tokens: Ints
    block_table: tuple[Ints, ...]
    state_slot: Ints
    state_copies: Ints
    logits_token: Ints
