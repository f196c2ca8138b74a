"""Gemma 2 in plain PyTorch, as small as it gets: what torch.compile makes of one decode step is a peer of ours.

Keys and values lie in fixed buffers, a ring where a layer has a window; nothing depends on the position but a mask, so
that one compiled step serves every token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional

from gemma2_fast.errors import BackendError
from gemma2_fast.spec import AttentionSpec, LayerSpec, ModelSpec
from gemma2_fast.weights.tensor import Tensor


class PlainLayer(nn.Module):
    """Projections that read the same are one matrix; norms hold 1 + w in float32; keys and values are [K, width, D].

    All are buffers: the compiler takes those for fixed addresses, and copies anything else before each step.
    """

    qkv: torch.Tensor
    output: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    before_mixer: torch.Tensor
    after_mixer: torch.Tensor
    before_mlp: torch.Tensor
    after_mlp: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, layer: LayerSpec, prefix: str, weights: Mapping[str, torch.Tensor], max_tokens: int) -> None:
        super().__init__()
        attention = layer.mixer
        if not (isinstance(attention, AttentionSpec) and layer.norms.after_mixer and layer.norms.after_mlp):
            raise BackendError(f"{prefix}: the plain model computes Gemma 2 and nothing else")
        self.attention = attention
        queries_keys_values = [weights[f"{prefix}attention.{role}"] for role in ("query", "key", "value")]
        self.register_buffer("qkv", torch.cat(queries_keys_values))
        self.register_buffer("output", weights[prefix + "attention.output"])
        self.register_buffer("gate_up", torch.cat([weights[f"{prefix}mlp.{role}"] for role in ("gate", "up")]))
        self.register_buffer("down", weights[prefix + "mlp.down"])
        for role in ("before_mixer", "after_mixer", "before_mlp", "after_mlp"):
            self.register_buffer(role, 1 + weights[f"{prefix}norm_{role}"].float())
        width = min(max_tokens, attention.window_keys or max_tokens)
        for role in ("keys", "values"):
            shape = (attention.num_kv_heads, width, attention.head_dim)
            self.register_buffer(role, torch.randn(shape, dtype=self.down.dtype, device=self.down.device))


class PlainGemma2(nn.Module):
    """weights: bfloat16, by canonical name; positions up to max_tokens - 1."""

    embedding: torch.Tensor
    final_norm: torch.Tensor
    frequencies: torch.Tensor

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], max_tokens: int, device: torch.device) -> None:
        super().__init__()
        on_device = {name: on(device, tensor) for name, tensor in weights.items()}
        layers = [
            PlainLayer(layer, f"layers.{index}.", on_device, max_tokens) for index, layer in enumerate(spec.layers)
        ]
        self.spec = spec
        self.layers = nn.ModuleList(layers)
        self.register_buffer("embedding", on_device["embedding"])
        self.register_buffer("final_norm", 1 + on_device["final_norm"].float())
        frequencies = torch.tensor(layers[0].attention.rope.inverse_frequencies(), dtype=torch.float32)
        self.register_buffer("frequencies", frequencies.to(device))

    def forward(self, token: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[V] float32 after one more token; token and position [1]."""
        x = self.embedding[token] * torch.tensor(self.spec.embedding_scale, dtype=self.embedding.dtype)
        angles = position.float() * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        for module in self.layers:
            layer = cast(PlainLayer, module)
            mixed = self._attend(layer, self._norm(x, layer.before_mixer), position, cos, sin)
            x = x + self._norm(mixed, layer.after_mixer)
            gate, up = functional.linear(self._norm(x, layer.before_mlp), layer.gate_up).chunk(2, dim=-1)
            down = functional.linear(functional.gelu(gate, approximate="tanh") * up, layer.down)
            x = x + self._norm(down, layer.after_mlp)
        logits = functional.linear(self._norm(x, self.final_norm), self.embedding)[0]
        return _capped(logits.float(), self.spec.final_softcap)

    def _attend(
        self, layer: PlainLayer, x: torch.Tensor, position: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> torch.Tensor:
        spec = layer.attention
        heads = functional.linear(x, layer.qkv).view(-1, spec.head_dim)
        queries, keys, values = heads.tensor_split([spec.num_query_heads, spec.num_query_heads + spec.num_kv_heads])
        width = layer.keys.shape[1]
        slot = position % width
        layer.keys.index_copy_(1, slot, _turned(keys, cos, sin)[:, None])
        layer.values.index_copy_(1, slot, values[:, None])
        grouped = _turned(queries, cos, sin).view(spec.num_kv_heads, -1, spec.head_dim)
        scores = _capped((grouped @ layer.keys.transpose(1, 2)).float() * spec.query_scale, spec.score_softcap)
        # A ring holds the window and nothing else, so that a full one is seen whole.
        seen = torch.arange(width, device=x.device) <= position
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).to(x.dtype)
        return functional.linear((weights @ layer.values).view(1, -1), layer.output)

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.spec.norm_epsilon)
        return (wide * scale * gain).to(x.dtype)


def on(device: torch.device, tensor: Tensor) -> torch.Tensor:
    """A stored bfloat16 tensor there."""
    values = torch.from_numpy(tensor.data.copy()).view(torch.bfloat16)
    return values.view(tensor.shape).to(device)


def _capped(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.float().chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
