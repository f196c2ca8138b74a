"""The real-gated linear recurrent unit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

DECAY_SHARPNESS = 8.0


def rg_lru(
    x: Tensor, input_gate: Tensor, recurrence_gate: Tensor, decay: Tensor, state: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """out[t] = h[t] = a[t] * h[t - 1] + sqrt(1 - a[t]^2) * sigmoid(input_gate[t]) * x[t].

    a[t] = exp(-8 * softplus(decay) * sigmoid(recurrence_gate[t])). At a document's first token (position 0) nothing is
    carried over and nothing damped: h[t] = sigmoid(input_gate[t]) * x[t].
    x [T, R], one sequence's consecutive tokens; the gates [T, R] before their sigmoids; decay [R]; positions int64 [T];
    state [R], h of the token before, float32 (float64 for float64). Returns out [T, R] in x's dtype and the last state.
    Rounds: gates, a and the new input after each step, in x's dtype; the recurrence in the state's, a row to x's dtype.
    Errors: ValueError when the shapes do not fit.
    Source: De et al. 2024, "Griffin", section 2.4; recurrentgemma's RGLRU, whose decay is that of -8 softplus.
    """
    same_rows = x.shape == input_gate.shape == recurrence_gate.shape
    if not (same_rows and decay.shape == state.shape == x.shape[1:] and positions.shape == x.shape[:1]):
        raise ValueError(
            f"rg_lru: x {tuple(x.shape)}, gates {tuple(input_gate.shape)} and {tuple(recurrence_gate.shape)}, decay "
            f"{tuple(decay.shape)} and state {tuple(state.shape)} do not fit"
        )
    starts = (positions == 0)[:, None]
    log_a = -DECAY_SHARPNESS * torch.sigmoid(recurrence_gate) * functional.softplus(decay)
    carried = log_a.exp().masked_fill(starts, 0)
    added = x * torch.sigmoid(input_gate) * damping(log_a).masked_fill(starts, 1)
    rows = []
    for a, new in zip(carried.to(state.dtype), added.to(state.dtype), strict=True):
        state = a * state + new
        rows.append(state)
    return torch.stack(rows).to(x.dtype), state


def damping(log_a: Tensor) -> Tensor:
    """sqrt(1 - a^2), which keeps the state's variance that of the input."""
    return torch.sqrt(1 - torch.exp(2 * log_a))
