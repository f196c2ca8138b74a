"""Configurations of released models, for models with random weights, and a small one of each kind that needs it."""

from __future__ import annotations

from typing import Any

VOCAB_SIZE = 256000

Config = dict[str, Any]


def gemma(
    *,
    layers: int,
    width: int,
    mlp_width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab_size: int = VOCAB_SIZE,
) -> Config:
    """config.json of a Gemma 1, and what those of the others have in common with it."""
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def gemma2(*, query_scalar: int, **shape: int) -> Config:
    return gemma(**shape) | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "query_pre_attn_scalar": query_scalar,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }


def recurrent_gemma(*, window: int = 2048, mlp_width: int, **shape: int) -> Config:
    """mlp_width: of one branch; the file counts both. window: earlier keys that a query sees."""
    return gemma(mlp_width=2 * mlp_width, kv_heads=1, **shape) | {
        "architectures": ["RecurrentGemmaForCausalLM"],
        "model_type": "recurrent_gemma",
        "lru_width": shape["width"],
        "attention_window_size": window,
        "block_types": ["recurrent", "recurrent", "attention"],
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "partial_rotary_factor": 0.5,
    }


SIZES = {
    "2b": gemma2(layers=26, width=2304, mlp_width=9216, heads=8, kv_heads=4, head_dim=256, query_scalar=256),
    "9b": gemma2(layers=42, width=3584, mlp_width=14336, heads=16, kv_heads=8, head_dim=256, query_scalar=256),
    "27b": gemma2(layers=46, width=4608, mlp_width=36864, heads=32, kv_heads=16, head_dim=128, query_scalar=144),
    "gemma-2b": gemma(layers=18, width=2048, mlp_width=16384, heads=8, kv_heads=1, head_dim=256),
    "recurrentgemma-2b": recurrent_gemma(layers=26, width=2560, mlp_width=7680, heads=10, head_dim=256),
    # A hundred thousand of its tokens take a minute or two.
    "recurrentgemma-small": recurrent_gemma(layers=5, width=256, mlp_width=512, heads=4, head_dim=64, vocab_size=4096),
}


def config(size: str) -> Config:
    """The config.json of a size."""
    return SIZES[size]
