"""RMSNorm with Gemma's offset gain, and the fused form between two branches of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.dependent_launch import wait_for_predecessor
from gemma2_fast.triton_kernels.specialisation import Specialisation

BLOCKS = (1024, 2048, 4096, 8192)  # powers of two from the width of every Gemma on


@triton.jit
def _normed(x, gain, width, epsilon):
    return x * tl.rsqrt(tl.sum(x * x) / width + epsilon) * (1.0 + gain)


@triton.jit
def rms_norm_kernel(
    x, weight, out, width, epsilon, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False
):  # fmt: skip
    """out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * (1 + weight), in float32, rounded once.

    x, out [T, E]; weight [E]; E = width <= BLOCK. Grid: (T,).
    """
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(DEPENDENT)
    values = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, _normed(values, gain, width, epsilon).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_add_kernel(
    branch, after, residual, before, out, width, epsilon,
    HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """What lies between two branches: residual += norm(branch, after); out = norm(residual, before).

    branch, out [T, E]; residual [T, E] float32, updated; after, before [E]. Without HAS_AFTER the branch is added as it
    is. The sum is kept in float32 and the second norm reads it unrounded. Grid: (T,).
    """
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(before + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_AFTER:
        after_gain = tl.load(after + column, mask=inside, other=0.0).to(tl.float32)
    wait_for_predecessor(DEPENDENT)
    added = tl.load(branch + row + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_AFTER:
        added = _normed(added, after_gain, width, epsilon)
    total = tl.load(residual + row + column, mask=inside, other=0.0) + added
    tl.store(residual + row + column, total, mask=inside)
    tl.store(out + row + column, _normed(total, gain, width, epsilon).to(out.dtype.element_ty), mask=inside)


def rms_norm(x: Any, weight: Any, epsilon: float, out: Any, num_warps: int = 4) -> None:
    """x, out [T, E]; weight [E]; contiguous tensors on one device."""
    tokens, width = x.shape
    rms_norm_kernel[(tokens,)](x, weight, out, width, epsilon, BLOCK=triton.next_power_of_2(width), num_warps=num_warps)


def rms_norm_add(
    branch: Any, after: Any | None, residual: Any, before: Any, epsilon: float, out: Any, num_warps: int = 4
) -> None:
    """branch, out [T, E]; residual [T, E] float32, updated; after (or None) and before [E]."""
    tokens, width = branch.shape
    rms_norm_add_kernel[(tokens,)](
        branch, before if after is None else after, residual, before, out, width, epsilon,
        HAS_AFTER=after is not None, BLOCK=triton.next_power_of_2(width), num_warps=num_warps,
    )  # fmt: skip


def specialisations(arch: int) -> Iterator[Specialisation]:
    for block in BLOCKS:
        warps = 4 if block < 4096 else 8
        yield Specialisation(
            op="rms_norm",
            kernel=rms_norm_kernel,
            types={"x": "*fp32", "weight": "*fp32", "out": "*bf16", "width": "i32", "epsilon": "fp32"},
            constants={"BLOCK": block},
            divisible=frozenset({"width"}),
            num_warps=warps,
        )
        for has_after in (False, True):
            yield Specialisation(
                op="rms_norm_add",
                kernel=rms_norm_add_kernel,
                types={
                    **{"branch": "*bf16", "after": "*fp32", "residual": "*fp32", "before": "*fp32", "out": "*bf16"},
                    **{"width": "i32", "epsilon": "fp32"},
                },
                constants={"HAS_AFTER": has_after, "BLOCK": block},
                divisible=frozenset({"width"}),
                num_warps=warps,
            )
