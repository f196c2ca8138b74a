"""What bench.ops measures: every float32 op at shapes of real models, with its exact result in NumPy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import PAGE_TOKENS, PagedKv
from gemma2_fast.quant import FORMATS

Array = NDArray[np.float32]
Exact = NDArray[np.floating[Any]]

# Rows and columns of the weight matrices that take most of the time.
MATRICES = {
    "270m": {"gate": (2048, 640), "down": (640, 2048), "output": (640, 1024), "head": (262144, 640)},
    "2b": {"gate": (9216, 2304), "down": (2304, 9216), "output": (2304, 2048), "head": (256000, 2304)},
}
# Model width, MLP width, query heads, kv heads, head dim.
SIZES = {"270m": (640, 2048, 4, 1, 256), "2b": (2304, 9216, 8, 4, 256)}
# Runs are short, so that some fall between interruptions. Few tokens read copies of a matrix, more than caches hold, a
# piece a run; many tokens are bound by arithmetic, and some rows stand for all.
COLD_BYTES = 512 << 20
PIECE_BYTES = 16 << 20
PIECE_ROWS = 256
MOST_DECODED_TOKENS = 16
CHECKED_ROWS = 256
# Float32 sums over 9216 columns stay below a tenth of it; a wrong nibble is far above.
LARGEST_ERROR = 2e-5
# How an array holds pages of a type, and the largest error: int8 rounds keys, values, queries and weights.
KV_TYPES: dict[str, tuple[type[np.generic], float]] = {
    "float32": (np.float32, LARGEST_ERROR),
    "bfloat16": (np.uint16, LARGEST_ERROR),
    "int8": (np.uint8, 0.05),
}


@dataclass(frozen=True)
class Case:
    """One row of the table. `run` gives the seconds of the kernel alone, `results` what it computed and the exact.

    num_bytes: read from memory, or moved through caches, in one run; operations: a multiply-add counts as two;
    limit: the probe of machine.Ceilings that bounds it. largest_error: allowed, as a share of the largest exact value.
    """

    op: str
    shape: str
    num_bytes: float
    operations: float
    limit: str
    run: Callable[[], float]
    results: Callable[[], tuple[NDArray[Any], Exact]]
    largest_error: float = LARGEST_ERROR
    cached: bool = False  # its bytes come from caches, so that the read bandwidth does not bound it

    @property
    def work(self) -> float:
        return self.num_bytes if self.limit == "read_bytes" else self.operations


def stored_weights(name: str, rows: int, cols: int) -> NDArray[np.uint8]:
    """Random bytes, whose halves are small and finite because no byte has its upper two bits."""
    stored = FORMATS[name]
    count = rows * stored.row_bytes(cols)
    return np.random.default_rng(0).integers(0x20, 0x30, count, dtype=np.uint8)


def matmul(ops: _core.Ops, model: str, matrix: str, name: str, num_tokens: int) -> Case:
    rows, cols = MATRICES[model][matrix]
    stored = FORMATS[name]
    data = stored_weights(name, rows, cols)
    decoding = num_tokens <= MOST_DECODED_TOKENS
    copies = -(-COLD_BYTES // data.nbytes) if decoding else 1
    data = np.tile(data, copies)
    all_rows = rows * copies
    piece = PIECE_BYTES // stored.row_bytes(cols) if decoding else min(PIECE_ROWS, rows)
    begins = itertools.cycle(range(0, all_rows - piece + 1, piece))
    x = np.random.default_rng(1).standard_normal((num_tokens, cols)).astype(np.float32)
    out = np.empty((num_tokens, all_rows), dtype=np.float32)

    def run() -> float:
        begin = next(begins)
        ops.matmul(name, data, all_rows, x, begin, begin + piece, out)
        return ops.kernel_seconds

    def results() -> tuple[Array, Exact]:
        """Of the first rows, which the first run computed."""
        picked = min(piece, CHECKED_ROWS)
        blocks = data[: picked * stored.row_bytes(cols)].reshape(-1, stored.block_bytes)
        weights = stored.unpack(blocks).reshape(-1, cols)[:picked].astype(np.float64)
        return out[:, :picked], x.astype(np.float64) @ weights.T

    limit = "read_bytes" if decoding else "float32_operations"
    shape = f"{model} {matrix} [{rows}, {cols}] x {num_tokens}"
    operations = 2.0 * piece * cols * num_tokens
    return Case(f"matmul {name}", shape, piece * stored.row_bytes(cols), operations, limit, run, results)


def elementwise(ops: _core.Ops, model: str, num_tokens: int) -> Iterator[Case]:
    """Ops whose cost is the bytes they move (read and written); these lie in caches, so they may pass the ceiling."""
    width, mlp_width, num_heads, _, head_dim = SIZES[model]
    rng = np.random.default_rng(2)
    x, residual = (rng.standard_normal((num_tokens, width)).astype(np.float32) for _ in range(2))
    gate, up = (rng.standard_normal((num_tokens, mlp_width)).astype(np.float32) for _ in range(2))
    heads = rng.standard_normal((num_tokens, num_heads, head_dim)).astype(np.float32)
    angles = rng.standard_normal((num_tokens, head_dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    gain = rng.standard_normal(width).astype(np.float32)

    def norm() -> Exact:
        wide = x.astype(np.float64)
        normed: Exact = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6) * gain
        return normed

    def gelu() -> Exact:
        g = gate.astype(np.float64)
        gated: Exact = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * up
        return gated

    def capped() -> Exact:
        return 30 * np.tanh(gate.astype(np.float64) / 30)

    def rotated() -> Exact:
        first, second = np.split(heads.astype(np.float64), 2, axis=2)
        c, s = cos[:, None], sin[:, None]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=2)

    def case(
        op: str, arrays: int, each: int, array: Array, call: Callable[[], Array], exact: Callable[[], Exact]
    ) -> Case:
        """arrays: read and written, of the size of `array`; each: operations an element, a tanh counted as one."""

        def run() -> float:
            call()
            return ops.kernel_seconds

        shape = f"{model} {list(array.shape)}"
        operations = float(each * array.size)
        return Case(
            op, shape, arrays * array.nbytes, operations, "read_bytes", run, lambda: (call(), exact()), cached=True
        )

    yield case("rms_norm", 2, 4, x, lambda: ops.rms_norm(x, gain, 1e-6), norm)
    yield case("rms_norm_add", 3, 5, x, lambda: ops.rms_norm_add(x, gain, 1e-6, residual), lambda: residual + norm())
    yield case("add", 3, 1, x, lambda: ops.add(x, residual), lambda: residual + x.astype(np.float64))
    yield case("scale", 2, 1, x, lambda: ops.scale(x, 3.25), lambda: 3.25 * x.astype(np.float64))
    yield case("softcap", 2, 3, gate, lambda: ops.softcap(gate, 30.0), capped)
    yield case("geglu", 3, 9, gate, lambda: ops.geglu(gate, up), gelu)
    yield case("rope", 2, 3, heads, lambda: ops.rope(heads, cos, sin), rotated)


def attention(ops: _core.Ops, model: str, context: int, num_queries: int, kv_type: str) -> Case:
    """One kv head's queries, the last of the context, over every key; the cap is Gemma 2's."""
    _, _, num_heads, num_kv_heads, head_dim = SIZES[model]
    group_heads = num_heads // num_kv_heads
    rng = np.random.default_rng(3)
    num_blocks = -(-context // PAGE_TOKENS)
    page_bytes = PagedKv((0,), 1, head_dim, None, 1, 1).block_bytes(kv_type, PAGE_TOKENS)
    element, largest_error = KV_TYPES[kv_type]
    pages: NDArray[Any] = np.zeros((num_blocks, 1, page_bytes // np.dtype(element).itemsize), element)
    # Few bits, so that bfloat16 holds them too.
    keys, values = (rng.integers(-8, 9, (context, head_dim)).astype(np.float32) / 8 for _ in range(2))
    for position in range(context):
        block, slot = divmod(position, PAGE_TOKENS)
        ops.write_kv(pages, block, slot, keys[position][None], values[position][None])
    table = np.arange(num_blocks, dtype=np.int32)
    queries = rng.standard_normal((num_queries, group_heads, head_dim)).astype(np.float32)
    first = context - num_queries

    def call() -> Array:
        return ops.attention(queries, pages, table, first, 0, head_dim**-0.5, 50.0, None)

    def run() -> float:
        call()
        return ops.kernel_seconds

    def exact() -> Exact:
        scores = 50 * np.tanh(queries.astype(np.float64) @ keys.T.astype(np.float64) * head_dim**-0.5 / 50)
        visible = np.arange(context)[None, None] <= (first + np.arange(num_queries))[:, None, None]
        weights = np.where(visible, np.exp(scores), 0)
        mixed: Exact = (weights / weights.sum(axis=2, keepdims=True)) @ values.astype(np.float64)
        return mixed

    decoding = num_queries == 1
    pairs = sum(range(first + 1, context + 1)) * group_heads
    operations = 4.0 * pairs * head_dim
    limit = "read_bytes" if decoding else "float32_operations"
    shape = f"{model} {num_queries} x {group_heads} queries, {context} keys"
    return Case(
        f"attention {kv_type}", shape, pages.nbytes, operations, limit, run, lambda: (call(), exact()), largest_error
    )
