"""Small quantised files and checkpoints that the tests write and break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_fast.quant import FORMATS
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.names import hf_names
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import TensorSource, write_quantized, write_safetensors
from tests.spec.configs import gemma2
from tests.support.checkpoints import random_weights

ORIGIN = Origin("int4", "google/gemma-2-2b, BF16", "0.1.0")
# Widths that no group divides, and a vocabulary of a strip and a bit.
CONFIG: dict[str, Any] = {
    **gemma2(2, 96, 2, 1, 24, 160, 24),
    "vocab_size": 100,
    "sliding_window": 8,
    "max_position_embeddings": 64,
}


def few_tensors() -> dict[str, Tensor]:
    """Two matrices in strips, of less and of more than a strip, and vectors of both kinds of alignment."""
    rng = np.random.default_rng(0)
    return {
        "norm": Tensor.from_float32(rng.standard_normal(5).astype(np.float32), FORMATS["BF16"]),
        "wide": Tensor.from_float32(rng.standard_normal((65, 33)).astype(np.float32), FORMATS["INT4_G32"]),
        "embed": Tensor.from_float32(rng.standard_normal((3, 130)).astype(np.float32), FORMATS["INT8_G128"]),
        "long": Tensor.from_float32(rng.standard_normal(32).astype(np.float32), FORMATS["BF16"]),
    }


def write_few(directory: Path, shard_bytes: int = 10**9) -> Path:
    """`few_tensors` as a quantised file or shards; the path of the single file."""
    sources = {name: TensorSource.of(tensor) for name, tensor in few_tensors().items()}
    write_quantized(directory, sources, ORIGIN, shard_bytes)
    return directory / "model.safetensors"


def header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_source(directory: Path, format_name: str = "BF16", config: dict[str, Any] = CONFIG) -> Path:
    """An unquantised checkpoint with all the files that one may have."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    (directory / "tokenizer_config.json").write_text("{}")
    (directory / "chat_template.jinja").write_text("{{ 1 }}")
    (directory / "README.md").write_text("not copied")
    spec = spec_from_config(config)
    names = hf_names(spec, ())
    weights = {names[name]: tensor for name, tensor in random_weights(spec, format_name).items()}
    write_safetensors(directory / "model.safetensors", weights, {"format": "pt"})
    return directory
