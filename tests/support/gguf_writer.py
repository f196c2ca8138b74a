"""Writes a checkpoint as GGUF the way llama.cpp does: +1 on norms, no query scale, no layer pattern."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFWriter

from gemma2_fast.spec import AttentionSpec, ModelSpec
from gemma2_fast.weights.names import gguf_names, is_norm
from gemma2_fast.weights.tensor import Tensor


def write_gguf(path: Path, architecture: str, spec: ModelSpec, weights: Mapping[str, Tensor]) -> None:
    """Write `weights` (canonical names, stored w) in their own formats; norms become float32 1 + w."""
    writer = GGUFWriter(path, architecture)
    attention = spec.layers[0].mixer
    if not isinstance(attention, AttentionSpec):
        raise TypeError("GGUF has no recurrent architecture")
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.model_width)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(spec.layers[0].mlp.width)
    writer.add_head_count(attention.num_query_heads)
    writer.add_head_count_kv(attention.num_kv_heads)
    writer.add_key_length(attention.head_dim)
    writer.add_value_length(attention.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_epsilon)
    if attention.score_softcap is not None:
        writer.add_attn_logit_softcapping(attention.score_softcap)
    if spec.final_softcap is not None:
        writer.add_final_logit_softcapping(spec.final_softcap)
    if attention.window_keys is not None:
        writer.add_sliding_window(attention.window_keys)
    writer.add_eos_token_id(1)
    for name, theirs in gguf_names(spec).items():
        tensor = weights[name]
        if is_norm(name):
            writer.add_tensor(theirs, tensor.to_float32() + 1)
        else:
            rows = tensor.data.reshape(*tensor.shape[:-1], -1)
            writer.add_tensor(theirs, rows, raw_dtype=GGMLQuantizationType[tensor.format.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
