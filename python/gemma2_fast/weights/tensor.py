"""A stored tensor: its shape, its format and its bytes, which usually lie in a memory-mapped file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.quant import FORMATS, Format


@dataclass(frozen=True)
class Tensor:
    """A row-major tensor in a format of `gemma2_fast.quant`.

    shape: dimensions, slowest first; a linear weight is (out, in). A scalar has shape ().
    data: uint8, one-dimensional, contiguous, exactly `num_bytes` long; it may be unaligned and read-only.
    """

    shape: tuple[int, ...]
    format: Format
    data: NDArray[np.uint8]

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    def to_float32(self) -> NDArray[np.float32]:
        """The exact weights, float32, of shape `shape`."""
        cols = self.shape[-1] if self.shape else 1
        blocks = self.data.reshape(-1, self.format.block_bytes)
        weights = self.format.unpack(blocks)
        row_weights = -(-cols // self.format.block_weights) * self.format.block_weights
        rows = weights.reshape(math.prod(self.shape[:-1]), row_weights)[:, :cols]
        return np.ascontiguousarray(rows).reshape(self.shape)

    @staticmethod
    def from_float32(values: NDArray[np.float32]) -> Tensor:
        """A float32 tensor that owns a copy of `values`."""
        data = np.ascontiguousarray(values, dtype=np.float32)
        return Tensor(tuple(values.shape), FORMATS["F32"], data.reshape(-1).view(np.uint8).copy())
