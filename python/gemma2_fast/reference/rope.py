"""Rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2_fast.spec import RopeSpec


def rope_tables(spec: RopeSpec, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of position * inverse_frequency, each [T, R / 2] with R = rotated_dims.

    positions int64 [T]. Rounds: the angle, then its cos and sin, to float32 whatever the dtype; then to `dtype`.
    (In bfloat16 angles, positions 8190 and 8191 would be the same.)
    Source: transformers Gemma2RotaryEmbedding.
    """
    frequencies = torch.tensor(spec.inverse_frequencies(), dtype=torch.float32)
    angles = positions.to(torch.float32)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns pair j of every head: (a, b) = (x_j, x_{j + R/2}) becomes (a cos - b sin, b cos + a sin).

    x [T, heads, D]; cos, sin [T, R / 2], R <= D; dims R.. pass through; out [T, heads, D]; one dtype.
    Rounds: each product and each sum, to the dtype.
    Errors: ValueError when the tables do not fit x.
    Source: Su et al. 2021, "RoFormer", in the halves convention: pairs are not neighbours.
    """
    pairs = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape[0] != x.shape[0] or 2 * pairs > x.shape[-1]:
        raise ValueError(f"rope: tables {tuple(cos.shape)}, {tuple(sin.shape)} do not fit x {tuple(x.shape)}")
    a, b, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)
