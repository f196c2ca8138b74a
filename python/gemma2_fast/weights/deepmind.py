"""The tensors of DeepMind's own RecurrentGemma checkpoints, named and laid out as Hugging Face has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from gemma2_fast.errors import WeightsError
from gemma2_fast.weights.tensor import Tensor

EMBEDDING = "embedder.input_embedding"

_TOP = {EMBEDDING: "model.embed_tokens.weight", "final_norm.scale": "model.final_norm.weight"}
_BLOCK = {
    "temporal_pre_norm.scale": "temporal_pre_norm.weight",
    "channel_pre_norm.scale": "channel_pre_norm.weight",
    "mlp_block.ffw_down.weight": "mlp_block.down_proj.weight",
    "mlp_block.ffw_down.bias": "mlp_block.down_proj.bias",
    "recurrent_block.conv_1d.b": "temporal_block.conv_1d.bias",
    "recurrent_block.rg_lru.a_param": "temporal_block.rg_lru.recurrent_param",
    "recurrent_block.rg_lru.input_gate.w": "temporal_block.rg_lru.input_gate_weight",
    "recurrent_block.rg_lru.input_gate.b": "temporal_block.rg_lru.input_gate_bias",
    "recurrent_block.rg_lru.a_gate.w": "temporal_block.rg_lru.recurrent_gate_weight",
    "recurrent_block.rg_lru.a_gate.b": "temporal_block.rg_lru.recurrent_gate_bias",
    "attention_block.proj_q.weight": "temporal_block.q_proj.weight",
    "attention_block.proj_k.weight": "temporal_block.k_proj.weight",
    "attention_block.proj_v.weight": "temporal_block.v_proj.weight",
    "attention_block.proj_final.weight": "temporal_block.o_proj.weight",
    "attention_block.proj_final.bias": "temporal_block.o_proj.bias",
} | {
    f"recurrent_block.{linear}.{kind}": f"temporal_block.{linear}.{kind}"
    for linear in ("linear_x", "linear_y", "linear_out")
    for kind in ("weight", "bias")
}
# Laid out otherwise, with their dimensions: [taps, R]; gate and up in one, [2, E, F] and [2, 1, 1, F].
_CONV, _GATE_AND_UP, _GATE_AND_UP_BIAS = "recurrent_block.conv_1d.w", "mlp_block.ffw_up.w", "mlp_block.ffw_up.b"
_DIMS = {_CONV: 2, _GATE_AND_UP: 3, _GATE_AND_UP_BIAS: 4}


def as_hugging_face(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors; an unknown name stays as it is. What is turned is copied, the rest stays mapped."""
    return {theirs: tensor for name, value in stored.items() for theirs, tensor in _renamed(name, value)}


def _renamed(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    blocks, _, rest = name.partition(".")
    index, _, role = rest.partition(".")
    prefix = f"model.layers.{index}."
    if name in _TOP:
        yield _TOP[name], tensor
    elif blocks != "blocks" or role not in _BLOCK.keys() | _DIMS.keys():
        yield name, tensor
    elif role in _BLOCK:
        yield prefix + _BLOCK[role], tensor
    else:
        if len(tensor.shape) != _DIMS[role]:
            raise WeightsError(f"misshapen: {name} is {tensor.shape}, expected {_DIMS[role]} dimensions")
        if role == _CONV:
            turned = _turned(tensor)
            width, num_taps = turned.shape
            yield prefix + "temporal_block.conv_1d.weight", Tensor((width, 1, num_taps), turned.format, turned.data)
        else:
            for branch, part in zip(("gate_proj", "up_proj"), _halves(tensor), strict=True):
                if role == _GATE_AND_UP:
                    yield f"{prefix}mlp_block.{branch}.weight", _turned(part)
                else:
                    yield f"{prefix}mlp_block.{branch}.bias", Tensor(part.shape[-1:], part.format, part.data)


def _halves(tensor: Tensor) -> list[Tensor]:
    return [Tensor(tensor.shape[1:], tensor.format, data) for data in np.split(tensor.data, 2)]


def _turned(tensor: Tensor) -> Tensor:
    """A matrix of plain elements with rows and columns exchanged."""
    rows, cols = tensor.shape
    elements = tensor.data.view(f"u{tensor.format.block_bytes}").reshape(rows, cols)
    return Tensor((cols, rows), tensor.format, np.ascontiguousarray(elements.T).view(np.uint8).reshape(-1))
