"""What `bench gpu ops` measures: a kernel at a shape, with cold buffers, its exact result and its peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from gemma2_fast.bench import shapes
from gemma2_fast.bench.gpu.card import Card, Run
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.gpu.rows import Limit
from gemma2_fast.triton_kernels import geglu as geglu_kernel
from gemma2_fast.triton_kernels import matmul as matmul_kernel
from gemma2_fast.triton_kernels import matmul_tiled as tiled_kernel
from gemma2_fast.triton_kernels.tuning import tuned
from gemma2_fast.triton_kernels.weight_formats import BF16, GROUP_COLS, INT4, INT8

DEVIATION = 0.02  # of weights
LARGEST_ERROR = 1e-2  # of results that are rounded to bfloat16
FORMATS = {"bfloat16": BF16.value, "int8": INT8.value, "int4": INT4.value}
HEAD_FORMATS = {"bfloat16": "bfloat16", "int8": "int8", "int4": "int8"}  # as weights/quantize.py keeps the embedding
LARGEST_CODES = {"int8": 127, "int4": 64}  # of int4 with its factor
LINEAR = "F.linear bfloat16"


@dataclass(frozen=True)
class GpuCase:
    """runs: the same work on buffers of their own; outs: what they write; results: of run i what it computed, and the
    exact. peers: by name, what makes their runs, which is not called before ours has been measured."""

    what: str
    shape: str
    runs: Sequence[Run]
    outs: Sequence[torch.Tensor]
    results: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
    limit: Limit | None = None
    peers: Mapping[str, Callable[[], Sequence[Run]]] = field(default_factory=dict)
    bars: str | None = None  # a key of bars.BARS
    largest_error: float = LARGEST_ERROR


@dataclass(frozen=True)
class RandomWeights:
    """Copies of a matrix of `cols` columns: [copies, rows, …] of what weight_formats.py has in its format."""

    cols: int
    weight: torch.Tensor
    scales: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of one copy."""
        return sum(part[0].nbytes for part in (self.weight, self.scales, self.factors) if part is not None)

    def exact(self, copy: int, rows: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """Those rows of a copy, [rows, cols] float32."""
        numbers = self.weight[copy][rows]
        if self.factors is not None:
            numbers = unpacked(numbers, self.factors[copy][rows])
        if self.scales is None:
            return numbers.float()
        scales = self.scales[copy][rows].float().repeat_interleave(GROUP_COLS, dim=1)
        return numbers[:, : self.cols].float() * scales[:, : self.cols]

    def arrays(self) -> Iterator[tuple[Any, ...]]:
        """Weight, scales and factors of each copy."""
        parts = (self.weight, self.scales, self.factors)
        return zip(*(itertools.repeat(None) if part is None else part for part in parts), strict=False)


def unpacked(packed: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """factor * (code - 8) of int4's arrays [rows, groups, 64] and [rows, groups, 2]: [rows, groups * 128] int8."""
    codes, of_runs = (torch.cat([part & 15, part >> 4], dim=-1).to(torch.int8) - 8 for part in (packed, factors))
    rows, groups, runs = of_runs.shape
    return (codes.view(rows, groups, runs, -1) * of_runs[..., None]).flatten(1)


def matrices(size: str) -> dict[str, tuple[int, int]]:
    """Rows and columns of what a decode step multiplies by; all but the head once a layer."""
    shape = shapes.SIZES[size]
    width, mlp_width, head_dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    return {
        "qkv": ((heads + 2 * kv_heads) * head_dim, width),
        "output": (width, heads * head_dim),
        "gate_up": (2 * mlp_width, width),
        "down": (width, mlp_width),
        "head": (shape["vocab_size"], width),
    }


def random_weights(card: Card, stored: str, rows: int, cols: int) -> RandomWeights:
    """As many copies as keep each one out of the caches."""
    if stored == "bfloat16":
        copies = card.copies(2 * rows * cols)
        return RandomWeights(cols, card.normal(copies, rows, cols, deviation=DEVIATION))
    groups = -(-cols // GROUP_COLS)
    factors = None
    if stored == "int8":
        copies = card.copies(rows * cols)
        codes = card.integers(-127, 128, copies, rows, cols, dtype=torch.int8)
    else:
        copies = card.copies(rows * cols // 2)
        codes = card.integers(0, 256, copies, rows, groups, GROUP_COLS // 2, dtype=torch.uint8)
        factors = card.integers(0, 256, copies, rows, groups, 2, dtype=torch.uint8)
    scales = card.normal(copies, rows, groups).abs_().add_(1).mul_(DEVIATION / LARGEST_CODES[stored])
    return RandomWeights(cols, codes, scales, factors)


def linear_runs(card: Card, x: torch.Tensor, weights: RandomWeights) -> Sequence[Run]:
    """PyTorch's product with such a matrix in bfloat16."""
    rows = weights.weight.shape[1]
    plain = weights if weights.scales is None else random_weights(card, "bfloat16", rows, weights.cols)
    return [partial(functional.linear, x, weight) for weight in plain.weight]


def block_sizes(op: str, card: Card, **shape: int) -> dict[str, Any]:
    """As keywords of the op's wrapper."""
    sizes = tuned(op, card.arch, **shape)
    constants = {name.lower(): value for name, value in sizes.constants.items()}
    return {**constants, "num_warps": sizes.num_warps, "num_stages": sizes.num_stages}


def matmul(card: Card, ceilings: GpuCeilings, size: str, matrix: str, stored: str) -> GpuCase:
    """One token, as a decode step multiplies: gate and up with the activation, the head into float32."""
    rows, cols = matrices(size)[matrix]
    weights = random_weights(card, stored, rows, cols)
    copies = len(weights.weight)
    geglu, head = matrix == "gate_up", matrix == "head"
    x = card.normal(1, cols)
    out_rows = rows // 2 if geglu else rows
    outs = card.empty(copies, 1, out_rows, dtype=torch.float32 if head else torch.bfloat16)
    how = {
        "geglu": geglu,
        "row_index": card.integers(0, 1, 1) if head else None,
        **block_sizes("matmul", card, tokens=1, format=FORMATS[stored]),
    }

    def results(copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        product = x.float() @ weights.exact(copy).T
        return outs[copy], _gated(product) if geglu else product

    return GpuCase(
        what=f"matmul {stored}",
        shape=f"{size} {matrix} [{rows}, {cols}] x 1",
        runs=[
            partial(matmul_kernel.matmul, x, weight, out, *others, **how)
            for (weight, *others), out in zip(weights.arrays(), outs, strict=True)
        ],
        outs=list(outs),
        results=results,
        limit=ceilings.bytes(weights.num_bytes),
        peers={LINEAR: partial(linear_runs, card, x, weights)},
        bars=f"matmul {stored}",
    )


def matmul_tiled(card: Card, ceilings: GpuCeilings, size: str, matrix: str, stored: str, num_tokens: int) -> GpuCase:
    rows, cols = matrices(size)[matrix]
    weights = random_weights(card, stored, rows, cols)
    copies = len(weights.weight)
    x = card.normal(num_tokens, cols)
    outs = card.empty(copies, num_tokens, rows)
    how = block_sizes("matmul_tiled", card, format=FORMATS[stored])

    return GpuCase(
        what=f"matmul_tiled {stored}",
        shape=f"{size} {matrix} [{rows}, {cols}] x {num_tokens}",
        runs=[
            partial(tiled_kernel.matmul_tiled, x, weight, out, *others, **how)
            for (weight, *others), out in zip(weights.arrays(), outs, strict=True)
        ],
        outs=list(outs),
        results=lambda copy: (outs[copy], x.float() @ weights.exact(copy).T),
        limit=ceilings.operations(2.0 * rows * cols * num_tokens),
        peers={LINEAR: partial(linear_runs, card, x, weights)},
    )


def geglu(card: Card, ceilings: GpuCeilings, size: str, num_tokens: int) -> GpuCase:
    """Alone, as it stands between the products of many tokens."""
    mlp_width = shapes.SIZES[size]["intermediate_size"]
    num_bytes = 2 * num_tokens * 3 * mlp_width
    copies = card.copies(num_bytes)
    gate_up, outs = card.normal(copies, num_tokens, 2 * mlp_width), card.empty(copies, num_tokens, mlp_width)
    return GpuCase(
        what="geglu",
        shape=f"{size} [{num_tokens}, {mlp_width}]",
        runs=[partial(geglu_kernel.geglu, given, out) for given, out in zip(gate_up, outs, strict=True)],
        outs=list(outs),
        results=lambda copy: (outs[copy], _gated(gate_up[copy].float())),
        limit=ceilings.bytes(num_bytes),
        bars="geglu",
    )


def _gated(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up
