"""The dtypes the reference computes in."""

from __future__ import annotations

from typing import Final

import torch

from gemma2_fast.errors import BackendError

DTYPES: Final = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; BackendError for one the reference does not compute in."""
    if name not in DTYPES:
        raise BackendError(f"the reference computes in {', '.join(DTYPES)}, not in {name!r}; choose one of them")
    return DTYPES[name]


def wide(dtype: torch.dtype) -> torch.dtype:
    """Where norms and softmax are computed: float32, or float64 when the dtype is float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
