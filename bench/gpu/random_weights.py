"""Random weights of a model's true shapes for a GPU, without a checkpoint and without as much memory as they take."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.bench.prepare import random_pieces
from gemma2_fast.quant import FORMATS, Format
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.manifest import Shape, manifest
from gemma2_fast.weights.quantize import quantized_format
from gemma2_fast.weights.tensor import Tensor

# Blocks that are drawn of a format whose blocks are weights, and of one whose blocks are strips. Primes, so that the
# rows of a matrix that goes through them again and again never begin at the same place twice.
DRAWN_WEIGHTS, DRAWN_STRIPS = 16_777_213, 2003
# Mean and deviation of what would else keep a recurrence out of the results: states last about twenty tokens, and the
# convolution is no smaller than what it adds up.
RECURRENCE = {"recurrent.decay": (-4.5, 1.0), "recurrent.conv": (0.0, 0.5)}

Bytes = NDArray[np.uint8]


def random_tensors(spec: ModelSpec, quantization: str | None, seed: int = 0) -> dict[str, Tensor]:
    """Every tensor by canonical name. Matrices of one format are stretches of one pool, each from a place of its own:
    together they take the memory of the largest."""
    rng = np.random.default_rng(seed)
    shapes = manifest(spec)
    formats = {name: _format(name, shape, quantization) for name, shape in shapes.items()}
    pools: dict[str, Bytes] = {}
    for stored in formats.values():
        if stored.name not in pools:
            largest = max(f.num_bytes(shapes[other]) for other, f in formats.items() if f is stored)
            pools[stored.name] = _pool(stored, largest, rng)

    def tensor(name: str, shape: Shape) -> Tensor:
        stored, role = formats[name], name.split(".", 2)[-1]
        if role in RECURRENCE:
            return Tensor.from_float32(rng.normal(*RECURRENCE[role], shape).astype(np.float32), stored)
        if len(shape) == 1:
            return Tensor(shape, stored, np.concatenate(list(random_pieces(shape, stored, rng))))
        begin = int(rng.integers(0, _drawn_blocks(stored))) * stored.block_bytes
        return Tensor(shape, stored, pools[stored.name][begin : begin + stored.num_bytes(shape)])

    return {name: tensor(name, shape) for name, shape in shapes.items()}


def _format(name: str, shape: Shape, quantization: str | None) -> Format:
    chosen = quantized_format(name, shape, quantization) if quantization is not None else None
    return chosen or FORMATS["BF16"]


def _drawn_blocks(stored: Format) -> int:
    return DRAWN_WEIGHTS if stored.block_rows == 1 else DRAWN_STRIPS


def _pool(stored: Format, largest_bytes: int, rng: np.random.Generator) -> Bytes:
    """What was drawn, over and over, from any of its blocks on long enough for the largest tensor."""
    count = _drawn_blocks(stored)
    drawn = np.concatenate(list(random_pieces((stored.block_rows, count * stored.block_weights), stored, rng)))
    return np.resize(drawn, largest_bytes + drawn.nbytes)
