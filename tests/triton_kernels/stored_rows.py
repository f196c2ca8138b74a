"""Weights as files hold them, repacked as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gemma2_fast.quant import FORMATS
from gemma2_fast.quant.row_major import row_major
from gemma2_fast.weights.tensor import Tensor
from tests.ops.plain import Floats


def before_nan(values: torch.Tensor) -> torch.Tensor:
    """The same float32 values where memory goes on with what must not be read."""
    memory = torch.full((values.numel() + 1024,), torch.nan)
    memory[: values.numel()] = values.flatten()
    return memory[: values.numel()].view(values.shape)


@dataclass(frozen=True)
class StoredRows:
    """`arrays`: weight, scales and, of int4, factors. Scales are float32, as the interpreter knows no bfloat16."""

    exact: Floats
    arrays: dict[str, torch.Tensor]

    @classmethod
    def make(cls, name: str, rows: int, cols: int) -> StoredRows:
        """Scales, and of int4 the factors of 32 columns, differ widely and in sign."""
        rng = np.random.default_rng((rows, cols))
        values = rng.standard_normal((rows, cols), np.float32)
        values *= np.exp2(rng.integers(-3, 1, (rows, -(-cols // 32)))).repeat(32, axis=1)[:, :cols].astype(np.float32)
        tensor = Tensor.from_float32(values, FORMATS[name])
        matrix = row_major(tensor.format, tensor.data, (rows, cols))
        scales = (matrix.scales.astype(np.uint32) << 16).view(np.float32)
        arrays = {"weight": torch.from_numpy(matrix.codes), "scales": before_nan(torch.from_numpy(scales))}
        if matrix.factors is not None:
            arrays["factors"] = torch.from_numpy(matrix.factors)
        return cls(tensor.to_float32(), arrays)

    def mutants(self) -> list[dict[str, torch.Tensor]]:
        """The arrays with one of them shifted or its nibbles swapped."""
        scales, wrong = self.arrays["scales"], []
        if "factors" in self.arrays:
            codes, factors = self.arrays["weight"], self.arrays["factors"]
            wrong += [{"weight": codes << 4 | codes >> 4}, {"weight": codes.roll(1, -1)}]
            wrong += [{"factors": factors << 4 | factors >> 4}, {"factors": factors.flip(-1)}]
        if scales.shape[1] > 1:
            wrong += [{"scales": scales.flip(-1)}]
        return [self.arrays | arrays for arrays in ({"scales": scales.roll(1, 0)}, *wrong)]
