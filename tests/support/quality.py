"""How much a quantised model loses: mean negative log-likelihood of public-domain prose under the real Gemma 3 270M.

The demo's GGUF file is first dequantised to bfloat16 safetensors, the model that all figures are relative to.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from gemma2_fast import Generator
from gemma2_fast.generator import load_text
from gemma2_fast.quant import FORMATS
from gemma2_fast.spec import ModelSpec
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.demo import demo_model_path
from gemma2_fast.weights.load import Checkpoint, load_checkpoint
from gemma2_fast.weights.names import hf_names
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors
from tests.spec.configs import gemma3
from tests.support.gguf_writer import write_gguf

TEXTS = tuple(Path(__file__).parents[1] / "data" / name for name in ("persuasion_1818.txt", "alice_1865.txt"))
WINDOW_TOKENS = 1024
# Tokens at the start of a window that only give the others a context.
UNSCORED_TOKENS = 32

# The 270M as config.json states it.
CONFIG = gemma3(18, 640, 4, 1, 256, 2048, 256, 512, 262144)


def windows(count: int | None = None) -> list[list[int]]:
    """The texts' tokens in windows that each begin with BOS; the first `count` of them, from both texts in turn."""
    tokenizer, _ = load_text(demo_checkpoint())
    assert tokenizer is not None
    bos, size = tokenizer.encode("")[0], WINDOW_TOKENS - 1
    texts = [tokenizer.encode(path.read_text(encoding="utf-8"))[1:] for path in TEXTS]
    starts = range(0, max(map(len, texts)), size)
    parts = [[bos, *text[start : start + size]] for start in starts for text in texts]
    return [part for part in parts if len(part) > 2 * UNSCORED_TOKENS][:count]


def losses(model: Path | str, parts: list[list[int]], **options: Any) -> NDArray[np.float32]:
    """-log p of every scored token of every window, in nats."""
    with Generator.from_pretrained(
        model, max_seq_len=WINDOW_TOKENS, max_batch_size=1, progress=False, **options
    ) as generator:
        return np.concatenate([-generator.score(part)[UNSCORED_TOKENS:] for part in parts])


def demo_checkpoint() -> Checkpoint:
    return load_checkpoint(demo_model_path(progress=False))


def write_bf16(directory: Path) -> None:
    """The demo model as a bfloat16 safetensors checkpoint without a tokenizer."""
    checkpoint = demo_checkpoint()
    spec = spec_from_config(CONFIG)
    if replace(spec, assumed=()) != _with_short_epsilon(checkpoint.spec, spec):
        raise ValueError(f"the demo file describes {checkpoint.spec}, its config.json {spec}")
    names = hf_names(spec, ())
    tensors = {names[name]: _as(tensor, "BF16") for name, tensor in checkpoint.weights.items()}
    (directory / "config.json").write_text(json.dumps(CONFIG))
    write_safetensors(directory / "model.safetensors", tensors)


def write_q4_0(bf16: Path, path: Path) -> None:
    """The bfloat16 checkpoint as a GGUF file that the gguf package quantised: Q4_0, the embedding Q8_0."""
    checkpoint = load_checkpoint(bf16)
    weights = {
        name: tensor if len(tensor.shape) == 1 else _by_gguf(tensor, "Q8_0" if name == "embedding" else "Q4_0")
        for name, tensor in checkpoint.weights.items()
    }
    write_gguf(path, "gemma3", checkpoint.spec, weights)


def report(name: str, values: NDArray[np.float32], baseline: NDArray[np.float32]) -> str:
    """One line: the mean, and its paired difference to the baseline with the standard error of that."""
    difference = values.astype(np.float64) - baseline
    error = difference.std() / len(difference) ** 0.5
    return f"{name:40s} {values.mean(dtype=np.float64):.4f} nats  {difference.mean():+.4f} +- {error:.4f}"


def _with_short_epsilon(spec: ModelSpec, other: ModelSpec) -> ModelSpec:
    """A GGUF file holds float32 numbers."""
    same = np.float32(spec.norm_epsilon) == np.float32(other.norm_epsilon)
    return replace(spec, assumed=(), norm_epsilon=other.norm_epsilon if same else spec.norm_epsilon)


def _as(tensor: Tensor, format_name: str) -> Tensor:
    return Tensor.from_float32(tensor.to_float32(), FORMATS[format_name])


def _by_gguf(tensor: Tensor, format_name: str) -> Tensor:
    packed = gguf.quants.quantize(tensor.to_float32(), gguf.GGMLQuantizationType[format_name])
    return Tensor(tensor.shape, FORMATS[format_name], np.ascontiguousarray(packed).reshape(-1))
