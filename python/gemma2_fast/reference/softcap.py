"""Soft capping of scores and logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softcap(x: Tensor, cap: float) -> Tensor:
    """out = cap * tanh(x / cap): the identity near 0, never beyond +-cap.

    x and out of one shape and dtype. Rounds: after each of the three steps, in x's dtype.
    Errors: ValueError unless cap is positive and finite (absence of a cap is the caller's None, never 0).
    Source: Gemma 2 report, section 2.
    """
    if not (math.isfinite(cap) and cap > 0):
        raise ValueError(f"softcap: cap must be positive and finite, got {cap}; leave the op out where there is no cap")
    return torch.tanh(x / cap) * cap
