"""Token embedding."""

from __future__ import annotations

import torch
from torch import Tensor


def embed(token_ids: Tensor, table: Tensor, scale: float) -> Tensor:
    """out[t] = table[token_ids[t]] * scale.

    token_ids int64 [T]; table [V, E]; out [T, E] in the table's dtype.
    Rounds: the scale to the dtype first (bfloat16: sqrt(3072) becomes 55.5), then the product.
    Errors: ValueError for an id outside 0..V-1.
    Source: transformers Gemma2TextScaledWordEmbedding; the output side of the tied table is not scaled.
    """
    wrong = token_ids[(token_ids < 0) | (token_ids >= table.shape[0])]
    if wrong.numel():
        raise ValueError(f"embed: token ids must lie in 0..{table.shape[0] - 1}, got {int(wrong[0])}")
    return table[token_ids] * torch.tensor(scale, dtype=table.dtype)
