"""A small random RecurrentGemma in the names and layouts of DeepMind's code, for the golden file and its test.

NumPy's RandomState draws the same numbers in every version, so no weights need be stored. This file runs in two
environments, that of the tests and that of DeepMind's package, and so imports neither.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# The root of the width, by which embeddings are scaled, is not a bfloat16.
VOCAB_SIZE, WIDTH, MLP_WIDTH, NUM_HEADS, LRU_WIDTH = 160, 80, 104, 5, 90
NUM_TAPS, WINDOW, SOFT_CAP = 4, 16, 30.0  # a query sees WINDOW earlier keys and its own
PATTERN = "RRARRARR"
# A head has 16 dims, 8 of them turned: their frequencies 1, 0.1, 0.01 and 0.001 are the same however they are computed.
HEAD_DIM = WIDTH // NUM_HEADS

# Shorter than the window, longer, and two documents.
SHORT, LONG, DOCUMENTS = 12, 75, (23, 31)
# Their tokens are drawn such that generation neither begins to repeat itself nor has a close choice.
SEEDS = {"short": 279, "long": 210, "first": 1, "second": 2}
# The tokens whose logits are kept; the last few of "packed" belong to the second document.
ROWS = {
    "short": [0, 1, 4, 11],
    "long": [0, 3, 14, 15, 16, 17, 18, 33, 50, 74],
    "packed": [0, 22, 23, 24, 40, 53],
    "batch": [2, 11],
}
GENERATED = ("short", "long", "batch")  # cases whose prompts are gone on with
NEW_TOKENS = 300


def tokens() -> dict[str, NDArray[np.int64]]:
    """Name → ids."""
    lengths = {"short": SHORT, "long": LONG, "first": DOCUMENTS[0], "second": DOCUMENTS[1]}
    return {
        name: np.random.RandomState(SEEDS[name]).randint(3, VOCAB_SIZE, length).astype(np.int64)
        for name, length in lengths.items()
    }


def config() -> dict[str, Any]:
    """The config.json that belongs to it."""
    return {
        "model_type": "recurrent_gemma",
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * MLP_WIDTH,
        "num_hidden_layers": len(PATTERN),
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": 1,
        "head_dim": HEAD_DIM,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "attention_window_size": WINDOW,
        "conv1d_width": NUM_TAPS,
        "lru_width": LRU_WIDTH,
        "logits_soft_cap": SOFT_CAP,
        "_block_types": ["recurrent", "recurrent", "attention"],
    }


def shapes() -> dict[str, tuple[int, ...]]:
    """DeepMind's name → shape."""
    block = LRU_WIDTH // NUM_HEADS
    found: dict[str, tuple[int, ...]] = {"embedder.input_embedding": (VOCAB_SIZE, WIDTH), "final_norm.scale": (WIDTH,)}
    for index, kind in enumerate(PATTERN):
        parts: dict[str, tuple[int, ...]] = {
            "temporal_pre_norm.scale": (WIDTH,),
            "channel_pre_norm.scale": (WIDTH,),
            "mlp_block.ffw_up.w": (2, WIDTH, MLP_WIDTH),
            "mlp_block.ffw_up.b": (2, 1, 1, MLP_WIDTH),
            "mlp_block.ffw_down.weight": (WIDTH, MLP_WIDTH),
            "mlp_block.ffw_down.bias": (WIDTH,),
        }
        if kind == "A":
            parts |= {
                "attention_block.proj_q.weight": (WIDTH, WIDTH),
                "attention_block.proj_k.weight": (HEAD_DIM, WIDTH),
                "attention_block.proj_v.weight": (HEAD_DIM, WIDTH),
                "attention_block.proj_final.weight": (WIDTH, WIDTH),
                "attention_block.proj_final.bias": (WIDTH,),
            }
        else:
            for linear in ("linear_x", "linear_y"):
                parts[f"recurrent_block.{linear}.weight"] = (LRU_WIDTH, WIDTH)
                parts[f"recurrent_block.{linear}.bias"] = (LRU_WIDTH,)
            parts |= {
                "recurrent_block.linear_out.weight": (WIDTH, LRU_WIDTH),
                "recurrent_block.linear_out.bias": (WIDTH,),
                "recurrent_block.conv_1d.w": (NUM_TAPS, LRU_WIDTH),
                "recurrent_block.conv_1d.b": (LRU_WIDTH,),
                "recurrent_block.rg_lru.a_param": (LRU_WIDTH,),
            }
            for gate in ("input_gate", "a_gate"):
                parts[f"recurrent_block.rg_lru.{gate}.w"] = (NUM_HEADS, block, block)
                parts[f"recurrent_block.rg_lru.{gate}.b"] = (NUM_HEADS, block)
        found |= {f"blocks.{index}.{name}": shape for name, shape in parts.items()}
    return found


def weights() -> dict[str, NDArray[np.float32]]:
    """DeepMind's name → float32 values, such that every part of the model is felt in its logits."""
    rng = np.random.RandomState(0)
    return {name: _drawn(rng, name, shape).astype(np.float32) for name, shape in sorted(shapes().items())}


def _drawn(rng: np.random.RandomState, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
    if name.endswith("a_param"):
        decay = rng.uniform(0.9, 0.999, shape)  # exp(-softplus(a_param))
        return np.asarray(np.log(1 / decay - 1))
    values = rng.standard_normal(shape)
    if name.endswith("input_embedding"):
        return np.asarray(0.05 * values)
    if name == "final_norm.scale":
        return np.asarray(24 + 3 * values)
    if name.endswith(("scale", ".b", "bias")):
        return np.asarray(0.3 * values)
    if name.endswith("conv_1d.w"):
        return np.asarray(0.5 * values)
    fan_in = shape[1] if len(shape) < 3 or "gate" not in name else shape[-2]
    gain = 1.3 if "proj_q" in name or "proj_k" in name else 1.0
    return np.asarray(gain * fan_in**-0.5 * values)
