"""The choice of the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2_fast.reference.softcap import softcap as capped

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


def uniform_draw(seed: int, token_index: int) -> float:
    """In [0, 1): 53 bits of SplitMix64 (Steele, Lea, Flood 2014), whose state is mixed from the seed."""
    return (_mixed(_mixed(seed + _GOLDEN) + (token_index + 1) * _GOLDEN) >> 11) / 2**53


def _mixed(x: int) -> int:
    x &= _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def candidates(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The tokens that may be chosen, ids ascending, and their weights, in float64.

    logits [V]. A token comes first if its logit before the cap is larger, on ties if its id is lower. Weights are
    exp((value - largest value) / temperature), a value being the logit after the cap. top_k: so many tokens that come
    first; top_p: of these the fewest whose weight reaches that share of theirs; min_p: tokens of at least that weight.
    """
    order = torch.sort(logits, descending=True, stable=True).indices
    values = logits.double() if softcap is None else capped(logits.double(), softcap)
    values = torch.where(logits > -torch.inf, values, -torch.inf)[order]
    weights = torch.exp((values - values[0]) / temperature)
    order, weights = order[:top_k], weights[:top_k]
    if top_p < 1:
        before = torch.cumsum(weights, 0) - weights
        size = max(1, int((before < top_p * weights.sum()).sum()))
        order, weights = order[:size], weights[:size]
    order, weights = order[weights >= min_p], weights[weights >= min_p]
    by_id = torch.argsort(order)
    return order[by_id], weights[by_id]


def sample(
    logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float, softcap: float | None
) -> int | None:
    """The candidate, in the order of their ids, at which the running sum of weights passes that share of their total.

    logits [V]; temperature 0: the token that comes first. None: logits hold NaN or infinity, or nothing above minus
    infinity. Rounds: nothing, in float64.
    """
    if not bool((logits < torch.inf).all()) or not bool((logits > -torch.inf).any()):
        return None
    if temperature == 0:
        return int(logits.argmax())
    ids, weights = candidates(logits, temperature, top_k, top_p, min_p, softcap)
    running = torch.cumsum(weights, 0)
    place = int(torch.searchsorted(running, uniform * running[-1], right=True))
    return int(ids[min(place, len(ids) - 1)])
