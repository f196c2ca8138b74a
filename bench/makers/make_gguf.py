"""A random GGUF file of a configuration's shape: python make_gguf.py config.json {q8_0,q4_0} OUT.gguf

Needs numpy and gguf. As in common Q4_0 files, the tied embedding is Q8_0 in both. The pieces of the vocabulary are made
up: "t0", "t1" … behind the control pieces and the 256 bytes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

TYPES = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
ROWS_AT_ONCE = 16384


def add_metadata(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    writer.add_sliding_window(config["sliding_window"])


def add_vocabulary(writer: GGUFWriter, vocab_size: int) -> None:
    control = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    pieces = control + [f"<0x{byte:02X}>" for byte in range(256)]
    kinds = [TokenType.CONTROL] * len(control) + [TokenType.BYTE] * 256
    kinds[control.index("<unk>")] = TokenType.UNKNOWN
    kinds += [TokenType.NORMAL] * (vocab_size - len(pieces))
    pieces += [f"t{i}" for i in range(len(pieces), vocab_size)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(vocab_size)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def add_weights(writer: GGUFWriter, config: dict[str, Any], linear: GGMLQuantizationType) -> None:
    rng = np.random.default_rng(0)
    width, mlp_width, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query_width = config["num_attention_heads"] * head_dim
    kv_width = config["num_key_value_heads"] * head_dim

    def matrix(name: str, rows: int, cols: int, kind: GGMLQuantizationType = linear) -> None:
        parts = []
        for row in range(0, rows, ROWS_AT_ONCE):
            values = rng.standard_normal((min(ROWS_AT_ONCE, rows - row), cols), dtype=np.float32)
            parts.append(quantize(values * np.float32(0.02), kind))
        writer.add_tensor(f"{name}.weight", np.concatenate(parts), raw_dtype=kind)

    def gain(name: str) -> None:
        writer.add_tensor(f"{name}.weight", (1 + 0.1 * rng.standard_normal(width)).astype(np.float32))

    matrix("token_embd", config["vocab_size"], width, GGMLQuantizationType.Q8_0)
    for layer in range(config["num_hidden_layers"]):
        block = f"blk.{layer}"
        matrix(f"{block}.attn_q", query_width, width)
        matrix(f"{block}.attn_k", kv_width, width)
        matrix(f"{block}.attn_v", kv_width, width)
        matrix(f"{block}.attn_output", width, query_width)
        matrix(f"{block}.ffn_gate", mlp_width, width)
        matrix(f"{block}.ffn_up", mlp_width, width)
        matrix(f"{block}.ffn_down", width, mlp_width)
        for norm in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            gain(f"{block}.{norm}")
    gain("output_norm")


def main(config_path: str, kind: str, out: str) -> None:
    config = json.loads(Path(config_path).read_text(encoding="utf-8"))
    writer = GGUFWriter(out, "gemma2")
    add_metadata(writer, config)
    add_vocabulary(writer, config["vocab_size"])
    add_weights(writer, config, TYPES[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
