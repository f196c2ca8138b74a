"""One layer's paged cache as the kernels see it, for tests of write_kv and attention."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core

PAGE_TOKENS = 32
BFLOAT16_NAN = 0x7FC0
UNTOUCHABLE = np.int32(2**30)  # a block index far outside any pool: reading through it crashes

Floats = NDArray[np.float32]


def round_to_bfloat16(values: Floats) -> Floats:
    """Nearest bfloat16, ties to even, as float32; for finite values."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def from_bfloat16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def int8_codes(values: Floats) -> tuple[Floats, Floats]:
    """Codes [T, K, D], as floats, and scales [T, K, 1] of an int8 cache."""
    scales = np.abs(values).max(axis=-1, keepdims=True) / np.float32(127)
    codes = np.clip(np.rint(values / np.where(scales > 0, scales, np.float32(1))), -127, 127)
    return codes, scales


class PagedCache:
    """`pages`: [N, K, a page's elements], NaN until they are written; `table`: the block of each logical page.

    An int8 page is bytes of all ones, which makes its scales NaN.
    """

    def __init__(
        self, ops: _core.Ops, kv_dtype: str, kv_heads: int, head_dim: int, table: Sequence[int], num_blocks: int
    ) -> None:
        self.ops = ops
        self.kv_dtype = kv_dtype
        self.head_dim = head_dim
        self.table = np.asarray(table, np.int32)
        padded = -(-head_dim // 32) * 32
        shape = (num_blocks, kv_heads, 2 * padded * PAGE_TOKENS)
        self.pages: NDArray[np.float32] | NDArray[np.uint16] | NDArray[np.uint8]
        if kv_dtype == "float32":
            self.pages = np.full(shape, np.nan, np.float32)
        elif kv_dtype == "bfloat16":
            self.pages = np.full(shape, BFLOAT16_NAN, np.uint16)
        else:
            self.pages = np.full((*shape[:2], shape[2] + 2 * PAGE_TOKENS * 4), 0xFF, np.uint8)

    @classmethod
    def filled(cls, ops: _core.Ops, kv_dtype: str, keys: Floats, values: Floats, seed: int = 0) -> PagedCache:
        """Holds keys and values [T, K, D] at positions 0, 1, …, in blocks that come in no order."""
        tokens, kv_heads, head_dim = keys.shape
        num_pages = -(-tokens // PAGE_TOKENS)
        order = np.random.default_rng(seed).permutation(num_pages + 3)[:num_pages]
        cache = cls(ops, kv_dtype, kv_heads, head_dim, order, num_pages + 3)
        cache.write(0, keys, values)
        return cache

    def write(self, first_position: int, keys: Floats, values: Floats) -> None:
        for position, (key, value) in enumerate(zip(keys, values, strict=True), start=first_position):
            page, slot = divmod(position, PAGE_TOKENS)
            block = int(self.table[page % len(self.table)])
            self.ops.write_kv(self.pages, block, slot, key, value)

    def stored(self, values: Floats) -> Floats:
        """What the cache keeps of these values."""
        if self.kv_dtype == "int8":
            codes, scales = int8_codes(values)
            return codes * scales
        return values if self.kv_dtype == "float32" else round_to_bfloat16(values)

    def attend(
        self,
        queries: Floats,
        first_position: int,
        *,
        kv_head: int = 0,
        scale: float,
        cap: float | None = None,
        window: int | None = None,
    ) -> Floats:
        """Queries and result: [T, G, D], for consecutive positions."""
        return self.ops.attention(
            queries,
            pages=self.pages,
            block_table=self.table,
            first_position=first_position,
            kv_head=kv_head,
            query_scale=scale,
            score_softcap=cap,
            window_keys=window,
        )
