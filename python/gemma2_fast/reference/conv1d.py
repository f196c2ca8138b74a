"""The short causal convolution of recurrent layers."""

from __future__ import annotations

import torch
from torch import Tensor


def conv1d(x: Tensor, weight: Tensor, bias: Tensor, tail: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """out[t, r] = bias[r] + sum_i weight[r, 0, i] * x[t - (C - 1) + i, r]: tap C - 1 meets the token itself.

    x [T, R], one sequence's consecutive tokens; tail [C - 1, R], the inputs before them; weight [R, 1, C]; bias [R];
    positions int64 [T], from 0 in each document. An input counts only within its document: one s tokens back where
    positions[t] >= s. Returns out [T, R] and the next tail; one dtype.
    Rounds: each product and each sum, to the dtype.
    Errors: ValueError when the shapes do not fit.
    Source: recurrentgemma's Conv1D, which has the taps first.
    """
    width, _, num_taps = weight.shape
    if x.shape[-1] != width or bias.shape != (width,) or tail.shape != (num_taps - 1, width):
        raise ValueError(
            f"conv1d: x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)} and tail "
            f"{tuple(tail.shape)} do not fit"
        )
    inputs = torch.cat((tail, x))
    out = torch.zeros_like(x)
    for back in range(num_taps):
        first = num_taps - 1 - back
        seen = inputs[first : first + len(x)].masked_fill((positions < back)[:, None], 0)
        out = out + seen * weight[:, 0, first]
    return out + bias, inputs[len(x) :]
