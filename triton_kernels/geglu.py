"""The gated activation of the MLP, on what one matmul gave for gate and up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.numerics import gelu_tanh
from gemma2_fast.triton_kernels.specialisation import Specialisation


@triton.jit
def geglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    """out[t, f] = gelu_tanh(gate_up[t, f]) * gate_up[t, F + f], computed in float32 and rounded once.

    gate_up [T, 2 F], out [T, F], F = width. Grid: (T, F / BLOCK, rounded up).
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    row = gate_up + token * 2 * width
    gate = tl.load(row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(row + width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, (gelu_tanh(gate) * up).to(out.dtype.element_ty), mask=inside)


def geglu(gate_up: Any, out: Any, block: int = 1024, num_warps: int = 4) -> None:
    """gate_up [T, 2 F] and out [T, F], contiguous tensors on one device."""
    tokens, width = out.shape
    geglu_kernel[(tokens, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block, num_warps=num_warps)


def specialisations(arch: int) -> Iterator[Specialisation]:
    yield Specialisation(
        op="geglu",
        kernel=geglu_kernel,
        types={"gate_up": "*bf16", "out": "*bf16", "width": "i32"},
        constants={"BLOCK": 1024},
        divisible=frozenset({"width"}),
    )
