"""Configurations of the released Gemma 2 sizes, for models with random weights."""

from __future__ import annotations

from typing import Any

# Layers, width, MLP width, query heads, kv heads, head dim, query_pre_attn_scalar.
SIZES = {
    "2b": (26, 2304, 9216, 8, 4, 256, 256),
    "9b": (42, 3584, 14336, 16, 8, 256, 256),
    "27b": (46, 4608, 36864, 32, 16, 128, 144),
}
VOCAB_SIZE = 256000


def config(size: str) -> dict[str, Any]:
    """The config.json of a size."""
    layers, width, mlp_width, heads, kv_heads, head_dim, scalar = SIZES[size]
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
