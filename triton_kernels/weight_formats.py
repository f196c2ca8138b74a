"""How kernels see the weights of a matrix [rows, cols]: the constant FORMAT, and the arrays of each.

BF16: weight [rows, cols].
INT8: weight [rows, cols] codes, scales [rows, groups] bfloat16; of each group of 128 columns weight = scale * code.
INT4: weight [rows, groups, 64], scales [rows, groups], factors [rows, groups, 2]: weight = scale * factor * (code - 8).
The low nibbles of a group's 64 bytes are the codes of its first 64 columns, the high ones those of the other 64, so
that both are runs of columns as they come. Of factors, too, low nibbles belong to the first half: byte j holds
factor + 8 of columns 32 j to 32 j + 31 of each half. A last group that is shorter is filled up with codes of 8.

gemma2_fast/quant/row_major.py makes these arrays of what files hold.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

BF16 = tl.constexpr(0)
INT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
GROUP_COLS = 128

FORMATS = (BF16.value, INT8.value, INT4.value)
# Of the arguments weight (or table), scales and factors; a format that lacks one gets any pointer.
WEIGHT_TYPES = {BF16.value: "*bf16", INT8.value: "*i8", INT4.value: "*u8"}
SCALE_TYPE = "*bf16"
FACTOR_TYPE = "*u8"


def format_of(scales: Any | None, factors: Any | None) -> int:
    """The format of a matrix that comes with these arrays."""
    if scales is None:
        return int(BF16.value)
    return int(INT8.value if factors is None else INT4.value)
