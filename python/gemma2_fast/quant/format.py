"""How the weights of a tensor are stored: one record a format, and the table of them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.errors import FileFormatError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Format:
    """A storage format: `block_weights` consecutive weights of `block_rows` rows lie in `block_bytes` bytes.

    With one row a block, a matrix is its rows one after another. Else it is its strips of `block_rows` rows, each the
    blocks of its columns in order; weights past the last row or column are zeros.
    `unpack` maps blocks uint8 [N, block_bytes] to their exact weights float32 [N, block_rows * block_weights], row by
    row; `pack` is its inverse up to rounding, None where the format is only read.
    """

    name: str
    block_weights: int
    block_bytes: int
    gguf_type: int | None
    unpack: Callable[[Bytes], Floats]
    pack: Callable[[Floats], Bytes] | None = None
    last_block_may_be_short: bool = False
    block_rows: int = 1

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row, or of a strip, of `cols` weights; FileFormatError where the row does not fill its blocks."""
        if cols % self.block_weights and not self.last_block_may_be_short:
            raise FileFormatError(
                f"a row of {cols} weights cannot be stored as {self.name}: its blocks hold {self.block_weights} weights"
            )
        return -(-cols // self.block_weights) * self.block_bytes

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor whose last dimension is that of its rows; FileFormatError as from `row_bytes`."""
        return -(-math.prod(shape[:-1]) // self.block_rows) * self.row_bytes(shape[-1] if shape else 1)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / (self.block_rows * self.block_weights)
