"""A kernel that does nothing but read: its rate is the ceiling of everything that memory bounds."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def stream_kernel(source, sums, BLOCK: tl.constexpr):
    """sums[b] = the sum of block b of source, int32, modulo 2^32. Grid: (blocks,)."""
    block = tl.program_id(0).to(tl.int64)
    values = tl.load(source + block * BLOCK + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(sums + block, tl.sum(values, 0))


def stream(source: Any, sums: Any, num_warps: int) -> None:
    """source [blocks, BLOCK] int32, BLOCK a power of two; sums [blocks] int32."""
    blocks, block = source.shape
    stream_kernel[(blocks,)](source, sums, BLOCK=block, num_warps=num_warps)
