"""The ops in plain torch: in float64 for the exact result; plainly, with sums in float32, for the usual error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

Tensor = torch.Tensor


def exact_and_plain(op: Callable[..., Tensor], *tensors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The op in float64, and in float32 and rounded to the dtype once, on the same inputs."""
    return op(*(x.double() for x in tensors)), op(*(x.float() for x in tensors)).to(dtype)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float = 1e-6) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon) * (1 + weight)


def geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.gelu(gate, approximate="tanh") * up


def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def gated_product(x: Tensor, weight: Tensor) -> Tensor:
    return geglu(x @ weight.T)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D]; cos, sin [T, D / 2]."""
    a, b = x.chunk(2, -1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((a * c - b * s, b * c + a * s), -1)


def attention(
    queries: Tensor, keys: Tensor, values: Tensor, *, context: int, scale: float, cap: float | None,
    window: int | None, sees_ahead: int = 0,
) -> Tensor:  # fmt: skip
    """queries [T, H, D] after `context` keys; keys, values [S, K, D]. Products round to the dtype of the inputs, scores
    are at least float32. sees_ahead: keys after its own that a query sees, by mistake."""
    tokens, heads, head_dim = queries.shape
    kv_heads = keys.shape[1]
    grouped = queries.view(tokens, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = (grouped @ keys.permute(1, 2, 0)[:, None]).to(wide) * scale  # [K, G, T, S]
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    position = context + torch.arange(tokens, device=queries.device)[:, None]
    key = torch.arange(len(keys), device=queries.device)[None]
    hidden = key > position + sees_ahead
    if window is not None:
        hidden |= key <= position - window
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).to(values.dtype)
    return (weights @ values.permute(1, 0, 2)[:, None]).permute(2, 0, 1, 3).reshape(queries.shape)
