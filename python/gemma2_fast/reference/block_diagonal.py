"""The linear layers of the recurrence's gates."""

from __future__ import annotations

import torch
from torch import Tensor


def block_diagonal(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """out[t, b, j] = sum_i x[t, b, i] * weight[b, i, j] + bias[b, j], for the b-th of equal blocks of x's columns.

    x [T, R]; weight [blocks, R / blocks, R / blocks] as (block, in, out), unlike matmul's; bias [blocks, R / blocks];
    out [T, R]; one dtype. Rounds: the sum, then the sum with the bias; sums of bfloat16 products are float32.
    Errors: ValueError when the shapes do not fit.
    Source: recurrentgemma's BlockDiagonalLinear.
    """
    num_blocks, block_in, block_out = weight.shape
    if x.shape[-1] != num_blocks * block_in or bias.shape != (num_blocks, block_out):
        raise ValueError(
            f"block_diagonal: x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {tuple(bias.shape)} do not fit"
        )
    blocks = x.view(-1, num_blocks, block_in)
    return (torch.einsum("tbi,bij->tbj", blocks, weight) + bias).flatten(1)
