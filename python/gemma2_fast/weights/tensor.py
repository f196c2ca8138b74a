"""A stored tensor: its shape, its format and its bytes, which usually lie in a memory-mapped file."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import WeightsError
from gemma2_fast.quant import FORMATS, Format


@dataclass(frozen=True)
class Tensor:
    """A tensor in a format of `gemma2_fast.quant`, its rows (those of the last dimension) laid out as that says.

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
        format, (rows, cols) = self.format, _rows_and_cols(self.shape)
        strips, blocks = -(-rows // format.block_rows), -(-cols // format.block_weights)
        weights = format.unpack(self.data.reshape(-1, format.block_bytes))
        tiles = weights.reshape(strips, blocks, format.block_rows, format.block_weights)
        whole = tiles.swapaxes(1, 2).reshape(strips * format.block_rows, blocks * format.block_weights)
        return np.ascontiguousarray(whole[:rows, :cols]).reshape(self.shape)

    @staticmethod
    def from_float32(values: NDArray[np.float32], format: Format = FORMATS["F32"]) -> Tensor:
        """A tensor that owns its bytes, as the format rounds `values`; WeightsError where it cannot hold them."""
        if format.pack is None:
            raise WeightsError(f"weights cannot be stored as {format.name}: the format is only read")
        format.row_bytes(values.shape[-1] if values.shape else 1)  # whether a row may end where it does
        rows, cols = _rows_and_cols(values.shape)
        strips, blocks = -(-rows // format.block_rows), -(-cols // format.block_weights)
        whole = np.zeros((strips * format.block_rows, blocks * format.block_weights), dtype=np.float32)
        whole[:rows, :cols] = values.reshape(rows, cols)
        tiles = whole.reshape(strips, format.block_rows, blocks, format.block_weights).swapaxes(1, 2)
        packed = format.pack(tiles.reshape(strips * blocks, format.block_rows * format.block_weights))
        return Tensor(tuple(values.shape), format, np.ascontiguousarray(packed).reshape(-1))


def _rows_and_cols(shape: tuple[int, ...]) -> tuple[int, int]:
    return math.prod(shape[:-1]), shape[-1] if shape else 1
