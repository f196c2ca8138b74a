"""RMSNorm with Gemma's offset gain."""

from __future__ import annotations

import torch
from torch import Tensor

from gemma2_fast.reference.dtypes import wide


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """out = x / sqrt(mean(x^2) + epsilon) * (1 + weight), the mean over the last dimension.

    x [..., E] and weight [E] in one dtype; out [..., E] in that dtype. The stored weight w stays w; 1 is added here.
    Rounds: once, at the end. Everything before is float32 (float64 for float64), the product with 1 + w included.
    Errors: ValueError when weight does not have x's last dimension.
    Source: Gemma 2 report, section 2; transformers Gemma2RMSNorm.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x rows have {x.shape[-1]} elements")
    values = x.to(wide(x.dtype))
    normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + epsilon)
    return (normed * (1.0 + weight.to(values.dtype))).to(x.dtype)
