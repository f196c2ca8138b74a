"""Checkpoints in memory: random weights of any storage format behind a Generator, without a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import Generator
from gemma2_fast.engine.options import EngineOptions, plan_engine
from gemma2_fast.quant import FORMATS, Format
from gemma2_fast.spec import ModelSpec
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.load import Checkpoint
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.quantize import UNQUANTIZED
from gemma2_fast.weights.tensor import Tensor
from tests.spec.configs import gemma1, gemma2, gemma3, recurrent_gemma

WINDOW_KEYS = 40


def quantisable_spec(family: str, **changes: Any) -> ModelSpec:
    """A small model whose every row is a whole number of 256-weight blocks, with a window of a page and a bit."""
    config = {
        "gemma": gemma1(2, 256, 2, 1, 512),
        "gemma2": gemma2(4, 256, 4, 2, 64, 512, 40),
        "gemma3_text": gemma3(6, 256, 4, 1, 64, 512, 64, WINDOW_KEYS, 512),
        "recurrent_gemma": {**recurrent_gemma(4, 256, 2), "head_dim": 128, "attention_window_size": WINDOW_KEYS - 1},
    }[family]
    small = {
        "vocab_size": 512,
        "head_dim": config["head_dim"] if family != "gemma" else 128,
        "sliding_window": WINDOW_KEYS,
    }
    caps = {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 12.0} if family == "gemma2" else {}
    return spec_from_config({**config, **small, **caps, "max_position_embeddings": 512, **changes})


def random_weights(spec: ModelSpec, format_name: str, seed: int = 0) -> dict[str, Tensor]:
    """Matrices in the format, the rest in float32; drawn as tests.support.tiny_models draws them."""
    rng = np.random.default_rng(seed)
    plain = format_name if format_name in UNQUANTIZED else "F32"
    weights = {}
    for name, shape in manifest(spec).items():
        if len(shape) == 3:  # gates and convolutions, which are never quantised
            weights[name] = random_matrix(rng, shape, FORMATS[plain], shape[-1] ** -0.5)
        elif len(shape) == 1 or name.endswith("_bias"):
            mean, deviation = {"final_norm": (14.0, 3.0), "decay": (-4.5, 1.0)}.get(name.rpartition(".")[2], (0.2, 0.4))
            weights[name] = Tensor.from_float32((mean + deviation * rng.standard_normal(shape)).astype(np.float32))
        else:
            deviation = 0.05 if name == "embedding" else shape[-1] ** -0.5
            weights[name] = random_matrix(rng, shape, FORMATS[format_name], deviation)
    return weights


def random_matrix(rng: np.random.Generator, shape: tuple[int, ...], format_: Format, deviation: float) -> Tensor:
    """A matrix of about the given standard deviation; formats that cannot be packed are drawn as blocks."""
    if format_.pack is not None:
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(deviation)
        return Tensor.from_float32(values, format_)
    blocks = _K_BLOCKS[format_.name](rng, int(np.prod(shape)) // format_.block_weights, deviation)
    return Tensor(shape, format_, np.ascontiguousarray(blocks).reshape(-1))


def generator(spec: ModelSpec, weights: dict[str, Tensor], *, max_logits_rows: int = 32, **options: Any) -> Generator:
    """A Generator over weights in memory."""
    checkpoint = Checkpoint(Path("memory"), spec, weights, {}, (), {})
    plan = plan_engine(spec, checkpoint.matrix_formats, EngineOptions(**options))
    return Generator(checkpoint, replace(plan, max_logits_rows=max(max_logits_rows, plan.max_logits_rows)))


def _half(value: float, num_blocks: int) -> NDArray[np.uint8]:
    return np.frombuffer(np.full(num_blocks, value, dtype=np.float16).tobytes(), np.uint8).reshape(num_blocks, 2)


def _codes(rng: np.random.Generator, num_blocks: int, num_bytes: int) -> NDArray[np.uint8]:
    return rng.integers(0, 256, (num_blocks, num_bytes), dtype=np.uint8)


def _scales_and_mins(num_blocks: int) -> NDArray[np.uint8]:
    """Twelve bytes in which all eight six-bit scales and minimums are 32."""
    return np.tile(np.array([32 | 2 << 6] * 8 + [0] * 4, np.uint8), (num_blocks, 1))


def _q4_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> NDArray[np.uint8]:
    d = deviation / (32 * 4.6)  # a uniform 4-bit code has standard deviation 4.6
    halves = [_half(d, num_blocks), _half(7.5 * d, num_blocks)]
    return np.hstack([*halves, _scales_and_mins(num_blocks), _codes(rng, num_blocks, 128)])


def _q5_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> NDArray[np.uint8]:
    d = deviation / (32 * 9.2)
    halves = [_half(d, num_blocks), _half(15.5 * d, num_blocks)]
    return np.hstack([*halves, _scales_and_mins(num_blocks), _codes(rng, num_blocks, 160)])


def _q6_k(rng: np.random.Generator, num_blocks: int, deviation: float) -> NDArray[np.uint8]:
    scales = rng.integers(8, 24, (num_blocks, 16)).astype(np.uint8)
    return np.hstack([_codes(rng, num_blocks, 192), scales, _half(deviation / (16 * 18.5), num_blocks)])


_K_BLOCKS = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k}
