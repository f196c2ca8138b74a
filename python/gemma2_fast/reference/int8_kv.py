"""What an int8 cache keeps of keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CODE = 127


def int8_kv(x: Tensor) -> Tensor:
    """out = scale * round(x / scale), with scale = max|x| / 127 over the head's dims.

    x and out [T, K, D], one dtype; a scale for each token and kv head, float32 (float64 for float64). Ties go to the
    even code. Zeros stay zeros; a row with NaN or infinity becomes NaN.
    Rounds: the scale, the quotient and the product, once each.
    """
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    scale = wide.abs().amax(dim=-1, keepdim=True) / LARGEST_CODE
    scale = torch.where(wide.isfinite().all(dim=-1, keepdim=True), scale, torch.nan)
    codes = torch.where(scale == 0, 0.0, wide / scale).round().clamp(-LARGEST_CODE, LARGEST_CODE)
    return (codes * scale).to(x.dtype)
