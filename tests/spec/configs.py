"""config.json contents of the released models, as reference/facts of the model cards give them."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def gemma1(layers: int, width: int, heads: int, kv_heads: int, mlp: int) -> Config:
    return {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "hidden_activation": None,
        "vocab_size": 256000,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }


def gemma2(layers: int, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int, scalar: int) -> Config:
    return {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 256000,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "query_pre_attn_scalar": scalar,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }


def gemma3(
    layers: int, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int, scalar: int, window: int, vocab: int
) -> Config:
    linear = {"rope_type": "linear", "factor": 8.0} if layers >= 34 else None
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 32768 if layers < 34 else 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": linear,
        "query_pre_attn_scalar": scalar,
        "sliding_window": window,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def recurrent_gemma(layers: int, width: int, heads: int) -> Config:
    return {
        "model_type": "recurrent_gemma",
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 256000,
        "hidden_size": width,
        "intermediate_size": 6 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_window_size": 2048,
        "conv1d_width": 4,
        "lru_width": width,
        "logits_soft_cap": 30.0,
        "_block_types": ["recurrent", "recurrent", "attention"],
    }


# name: (config, parameters, tensors) with the counts published for the tied Hugging Face models.
RELEASED: dict[str, tuple[Config, int, int]] = {
    "gemma-2b": (gemma1(18, 2048, 8, 1, 16384), 2_506_172_416, 164),
    "gemma-7b": (gemma1(28, 3072, 16, 16, 24576), 8_537_680_896, 254),
    "gemma-2-2b": (gemma2(26, 2304, 8, 4, 256, 9216, 256), 2_614_341_888, 288),
    "gemma-2-9b": (gemma2(42, 3584, 16, 8, 256, 14336, 256), 9_241_705_984, 464),
    "gemma-2-27b": (gemma2(46, 4608, 32, 16, 128, 36864, 144), 27_227_128_320, 508),
    "gemma-3-270m": (gemma3(18, 640, 4, 1, 256, 2048, 256, 512, 262144), 268_098_176, 236),
    "gemma-3-1b": (gemma3(26, 1152, 4, 1, 256, 6912, 256, 512, 262144), 999_885_952, 340),
    "gemma-3-4b": (gemma3(34, 2560, 8, 4, 256, 10240, 256, 1024, 262208), 3_880_263_168, 444),
    "gemma-3-12b": (gemma3(48, 3840, 16, 8, 256, 15360, 256, 1024, 262208), 11_766_034_176, 626),
    "gemma-3-27b": (gemma3(62, 5376, 32, 16, 128, 21504, 168, 1024, 262208), 27_009_346_304, 808),
    "recurrentgemma-2b": (recurrent_gemma(26, 2560, 10), 2_682_862_080, 484),
    "recurrentgemma-9b": (recurrent_gemma(38, 4096, 16), 8_579_977_216, 704),
}
