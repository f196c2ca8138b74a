"""Storage formats of weights: one file a format, and the table of them all."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from gemma2_fast.quant.bf16 import BF16
from gemma2_fast.quant.f16 import F16
from gemma2_fast.quant.f32 import F32
from gemma2_fast.quant.format import Format
from gemma2_fast.quant.int4 import INT4_G32
from gemma2_fast.quant.int8 import INT8_G128
from gemma2_fast.quant.q4_0 import Q4_0
from gemma2_fast.quant.q4_1 import Q4_1
from gemma2_fast.quant.q4_k import Q4_K
from gemma2_fast.quant.q5_0 import Q5_0
from gemma2_fast.quant.q5_1 import Q5_1
from gemma2_fast.quant.q5_k import Q5_K
from gemma2_fast.quant.q6_k import Q6_K
from gemma2_fast.quant.q8_0 import Q8_0

FORMATS: Mapping[str, Format] = MappingProxyType(
    {f.name: f for f in (F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, INT8_G128, INT4_G32)}
)
FORMAT_BY_GGUF_TYPE: Mapping[int, Format] = MappingProxyType(
    {f.gguf_type: f for f in FORMATS.values() if f.gguf_type is not None}
)

__all__ = ["FORMATS", "FORMAT_BY_GGUF_TYPE", "Format"]
