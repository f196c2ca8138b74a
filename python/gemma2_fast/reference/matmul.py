"""The linear layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[t, r] = sum_c weight[r, c] * x[t, c] + bias[r].

    x [T, cols], weight [rows, cols] as checkpoints store it, bias [rows] or None; out [T, rows]; one dtype.
    Rounds: once an element, the bias included; sums of bfloat16 products are float32.
    Errors: ValueError when the columns differ.
    """
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"matmul: x has {x.shape[-1]} columns, weight {tuple(weight.shape)} needs {weight.shape[1]}")
    return functional.linear(x, weight, bias)
