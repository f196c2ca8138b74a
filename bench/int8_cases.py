"""What bench.ops measures of the int8 path: activations to int8, and their products with quantised weights."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.bench import cases
from gemma2_fast.bench.cases import Array, Case, Exact
from gemma2_fast.bench.prepare import random_blocks
from gemma2_fast.quant import FORMATS
from gemma2_fast.quant.strips import STRIP_ROWS
from gemma2_fast.weights.tensor import Tensor

# Half a step of 254 between -max and max of a group, which the largest value of all bounds; and a rounding.
QUANTIZATION_ERROR = 0.51 / 127
FORMAT_NAMES = [name for name in FORMATS if name not in ("F32", "F16", "BF16")]


def quantize_rows(ops: _core.Ops, model: str, num_tokens: int) -> Case:
    """Reads float32 and writes bytes, in caches."""
    x = np.random.default_rng(4).standard_normal((num_tokens, cases.SIZES[model][0])).astype(np.float32)

    def run() -> float:
        ops.quantize_rows(x)
        return ops.kernel_seconds

    return Case(
        "quantize_rows",
        f"{model} {list(x.shape)}",
        x.nbytes + x.size,
        4.0 * x.size,
        "read_bytes",
        run,
        lambda: (dequantized_rows(ops, x), x.astype(np.float64)),
        QUANTIZATION_ERROR,
        cached=True,
    )


def int8_matmul(ops: _core.Ops, model: str, matrix: str, name: str, num_tokens: int) -> Case:
    """The exact result is that of the activations as they are quantised."""
    rows, cols = cases.MATRICES[model][matrix]
    stored = FORMATS[name]
    if stored.block_rows > 1:
        num_blocks = stored.num_bytes((rows, cols)) // stored.block_bytes
        data = random_blocks(num_blocks, stored, np.random.default_rng(0))
    else:
        data = cases.stored_weights(name, rows, cols)
    strips = _core.Ops.pack_strips(name, data, rows, cols)
    decoding = num_tokens <= cases.MOST_DECODED_TOKENS
    copies = -(-cases.COLD_BYTES // strips.nbytes) if decoding else 1
    strips = np.tile(strips, copies)
    all_rows = rows * copies
    num_strips = all_rows // STRIP_ROWS
    strip_bytes = strips.nbytes // num_strips
    wanted = cases.PIECE_BYTES // strip_bytes if decoding else cases.PIECE_ROWS // STRIP_ROWS
    piece = min(max(1, wanted), num_strips)
    begins = itertools.cycle(range(0, num_strips - piece + 1, piece))
    x = np.random.default_rng(1).standard_normal((num_tokens, cols)).astype(np.float32)
    out = np.empty((num_tokens, all_rows), dtype=np.float32)

    def run() -> float:
        begin = next(begins)
        ops.int8_matmul(name, strips, all_rows, x, begin, begin + piece, out)
        return ops.kernel_seconds

    def results() -> tuple[Array, Exact]:
        """Of the first rows, which the first run computed."""
        picked = min(piece * STRIP_ROWS, cases.CHECKED_ROWS)
        first = Tensor((picked, cols), stored, data[: stored.num_bytes((picked, cols))])
        return out[:, :picked], dequantized_rows(ops, x).astype(np.float64) @ first.to_float32().astype(np.float64).T

    return Case(
        f"int8_matmul {name}",
        f"{model} {matrix} [{rows}, {cols}] x {num_tokens}",
        piece * strip_bytes,
        2.0 * piece * STRIP_ROWS * cols * num_tokens,
        "read_bytes" if decoding else "int8_operations",
        run,
        results,
    )


def dequantized_rows(ops: _core.Ops, x: Array) -> NDArray[np.float64]:
    """What the kernels make of activations: integers times the scales of their groups, [T, cols]."""
    scales, integers, _ = ops.quantize_rows(x)
    values: NDArray[np.float64] = integers.astype(np.float64) * scales[:, :, None]
    return values.transpose(1, 0, 2).reshape(len(x), -1)[:, : x.shape[1]]
