"""Causal attention of one sequence: grouped queries, optional soft cap, optional sliding window."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemma2_fast.reference.dtypes import wide
from gemma2_fast.reference.softcap import softcap


def attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    first_query: int,
    first_key: int,
    query_scale: float,
    score_softcap: float | None,
    window_keys: int | None,
) -> Tensor:
    """out[q, h] = sum_s softmax_s(mask(cap(query_scale * queries[q, h] . keys[s, g]))) * values[s, g].

    Query head h shares kv head g = h // (H / K). queries and out [T, H, D]; keys, values [S, K, D]; one
    dtype. Query q stands at position p = first_query + q, key s at k = first_key + s. The query sees the keys with
    k <= p, and with a window W only those with p - W < k: W keys, itself included. The cap comes before the mask.
    Keys that no query sees may be given or not.
    Rounds: scores, scaled scores and each step of the cap to the dtype; softmax in float32 (float64 for float64), its
    result to the dtype; out once an element.
    Errors: ValueError when the shapes do not fit, or when a query's own key is not among the keys.
    Source: Gemma 2 report, section 2; transformers eager_attention_forward of Gemma 2.
    """
    num_queries, num_heads, head_dim = queries.shape
    num_keys, num_kv_heads, _ = keys.shape
    if keys.shape != values.shape or keys.shape[2] != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            f"attention: queries {tuple(queries.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)} "
            "do not fit"
        )
    if first_query < first_key or first_query + num_queries > first_key + num_keys:
        raise ValueError(
            f"attention: queries at {first_query}..{first_query + num_queries - 1} need their own keys, got keys "
            f"{first_key}..{first_key + num_keys - 1}"
        )
    group_heads = num_heads // num_kv_heads
    keys, values = (x.repeat_interleave(group_heads, dim=1).transpose(0, 1) for x in (keys, values))
    scores = queries.transpose(0, 1) @ keys.transpose(1, 2) * query_scale
    hidden = hidden_keys(num_queries, num_keys, first_query - first_key, window_keys)
    scores = capped_then_masked(scores, score_softcap, hidden)
    shares = torch.softmax(scores, dim=-1, dtype=wide(scores.dtype)).to(queries.dtype)
    return (shares @ values).transpose(0, 1)


def hidden_keys(num_queries: int, num_keys: int, offset: int, window_keys: int | None) -> Tensor:
    """True where a query must not see a key: bool [T, S]. Query q stands `offset + q` keys after the first key."""
    distance = torch.arange(offset, offset + num_queries)[:, None] - torch.arange(num_keys)
    hidden = distance < 0
    return hidden if window_keys is None else hidden | (distance >= window_keys)


def capped_then_masked(scores: Tensor, score_softcap: float | None, hidden: Tensor) -> Tensor:
    """Scores [H, T, S], capped, and minus infinity where hidden [T, S]."""
    capped = scores if score_softcap is None else softcap(scores, score_softcap)
    return capped.masked_fill(hidden, -math.inf)
