"""Canonical tensor names ↔ those of Hugging Face checkpoints and GGUF files."""

from __future__ import annotations

from collections.abc import Collection

from gemma2_fast.spec import LayerSpec, ModelSpec
from gemma2_fast.weights.manifest import manifest

# Where a Hugging Face checkpoint keeps its text model: alone, or inside a multimodal one of either era.
HF_PREFIXES = ("model.", "language_model.model.", "model.language_model.", "")
# Parts of a multimodal checkpoint that a text model does without, and buffers that old files saved.
HF_IGNORED = ("vision_tower.", "model.vision_tower.", "multi_modal_projector.", "model.multi_modal_projector.")
HF_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
HF_OUTPUT = ("lm_head.weight", "language_model.lm_head.weight")
GGUF_OUTPUT = "output.weight"

_HF_ATTENTION = {
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.output": "self_attn.o_proj.weight",
    "attention.query_norm": "self_attn.q_norm.weight",
    "attention.key_norm": "self_attn.k_norm.weight",
}
_HF_LAYER = _HF_ATTENTION | {
    "norm_before_mixer": "input_layernorm.weight",
    "norm_after_mixer": "post_attention_layernorm.weight",
    "norm_before_mlp": "pre_feedforward_layernorm.weight",
    "norm_after_mlp": "post_feedforward_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
}
# Without a norm after the mixer, Hugging Face gives that norm's name to the one before the MLP.
_HF_LAYER_TWO_NORMS = _HF_LAYER | {"norm_before_mlp": "post_attention_layernorm.weight"}

_HF_GRIFFIN_LAYER = {
    "norm_before_mixer": "temporal_pre_norm.weight",
    "norm_before_mlp": "channel_pre_norm.weight",
    "attention.query": "temporal_block.q_proj.weight",
    "attention.key": "temporal_block.k_proj.weight",
    "attention.value": "temporal_block.v_proj.weight",
    "attention.output": "temporal_block.o_proj.weight",
    "attention.output_bias": "temporal_block.o_proj.bias",
    "recurrent.conv": "temporal_block.conv_1d.weight",
    "recurrent.conv_bias": "temporal_block.conv_1d.bias",
    "recurrent.decay": "temporal_block.rg_lru.recurrent_param",
    "recurrent.input_gate": "temporal_block.rg_lru.input_gate_weight",
    "recurrent.input_gate_bias": "temporal_block.rg_lru.input_gate_bias",
    "recurrent.recurrence_gate": "temporal_block.rg_lru.recurrent_gate_weight",
    "recurrent.recurrence_gate_bias": "temporal_block.rg_lru.recurrent_gate_bias",
} | {
    f"{role}{ours}": f"{theirs}.{kind}"
    for role, theirs in {
        "recurrent.linear_x": "temporal_block.linear_x",
        "recurrent.linear_y": "temporal_block.linear_y",
        "recurrent.linear_out": "temporal_block.linear_out",
        "mlp.gate": "mlp_block.gate_proj",
        "mlp.up": "mlp_block.up_proj",
        "mlp.down": "mlp_block.down_proj",
    }.items()
    for ours, kind in (("", "weight"), ("_bias", "bias"))
}

_GGUF_LAYER = {
    "norm_before_mixer": "attn_norm.weight",
    "norm_after_mixer": "post_attention_norm.weight",
    "norm_before_mlp": "ffn_norm.weight",
    "norm_after_mlp": "post_ffw_norm.weight",
    "attention.query": "attn_q.weight",
    "attention.key": "attn_k.weight",
    "attention.value": "attn_v.weight",
    "attention.output": "attn_output.weight",
    "attention.query_norm": "attn_q_norm.weight",
    "attention.key_norm": "attn_k_norm.weight",
    "mlp.gate": "ffn_gate.weight",
    "mlp.up": "ffn_up.weight",
    "mlp.down": "ffn_down.weight",
}


def hf_names(spec: ModelSpec, present: Collection[str]) -> dict[str, str]:
    """Canonical name → Hugging Face name, under the prefix that the tensors in `present` use."""
    griffin = spec.family == "recurrent_gemma"
    prefix = next((p for p in HF_PREFIXES if p + "embed_tokens.weight" in present), HF_PREFIXES[0])

    def table(layer: LayerSpec) -> dict[str, str]:
        if griffin:
            return _HF_GRIFFIN_LAYER
        return _HF_LAYER if layer.norms.after_mixer else _HF_LAYER_TWO_NORMS

    top = {"embedding": "embed_tokens.weight", "final_norm": "final_norm.weight" if griffin else "norm.weight"}
    names = {}
    for name in manifest(spec):
        index, role = _split(name)
        if index is None:
            names[name] = prefix + top[role]
        else:
            names[name] = f"{prefix}layers.{index}.{table(spec.layers[index])[role]}"
    return names


def gguf_names(spec: ModelSpec) -> dict[str, str]:
    """Canonical name → GGUF name."""
    top = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight"}
    names = {}
    for name in manifest(spec):
        index, role = _split(name)
        names[name] = top[role] if index is None else f"blk.{index}.{_GGUF_LAYER[role]}"
    return names


def is_norm(name: str) -> bool:
    """Whether a canonical name is that of an RMSNorm's weight, which a GGUF file stores with 1 added."""
    role = name.rpartition(".")[2]
    return role == "final_norm" or role.startswith("norm_") or role.endswith("_norm")


def _split(name: str) -> tuple[int | None, str]:
    if not name.startswith("layers."):
        return None, name
    _, index, role = name.split(".", 2)
    return int(index), role
