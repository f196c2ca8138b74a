"""How kernels see the weights of a matrix: the constant FORMAT, and the arrays that each format has."""

from __future__ import annotations

from typing import Any

import triton.language as tl

BF16 = tl.constexpr(0)  # numbers
INT8 = tl.constexpr(1)  # codes, and a scale for each group of columns
GROUP_COLS = 128  # columns that share a scale

FORMATS = (BF16.value, INT8.value)
# Of the arguments weight (or table), scales and factors; a format that lacks one gets any pointer.
WEIGHT_TYPES = {BF16.value: "*bf16", INT8.value: "*i8"}
SCALE_TYPE = "*bf16"
FACTOR_TYPE = "*u8"


def format_of(scales: Any | None) -> int:
    """The format of a matrix that comes with these arrays."""
    return int(BF16.value if scales is None else INT8.value)
