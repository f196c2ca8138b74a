"""Weights as a GPU keeps them: vectors in float32, matrices row after row in a format that has kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.quant import FORMATS
from gemma2_fast.quant.row_major import row_major
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.quantize import quantized_format
from gemma2_fast.weights.tensor import Tensor

# Stored formats that have kernels of their own; all others become bfloat16.
_FORMATS = {"INT8_G128": "int8", "INT4_G32": "int4"}


def device_format(tensor: Tensor) -> str:
    return _FORMATS.get(tensor.format.name, "bfloat16")


def device_parts(tensor: Tensor, in_float32: bool) -> dict[str, NDArray[np.uint8]]:
    """The bytes of each part of a tensor, by the names of _core.GraphStep.upload. in_float32: it is no matrix there."""
    if in_float32:
        return {"weight": _bytes(tensor.to_float32())}
    if tensor.format.name in _FORMATS:
        rows = row_major(tensor.format, tensor.data, (math.prod(tensor.shape[:-1]), tensor.shape[-1]))
        parts = {"weight": rows.codes, "scales": rows.scales, "factors": rows.factors}
        return {name: _bytes(part) for name, part in parts.items() if part is not None}
    if tensor.format is not FORMATS["BF16"]:
        tensor = Tensor.from_float32(tensor.to_float32(), FORMATS["BF16"])
    return {"weight": tensor.data}


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return values.reshape(-1).view(np.uint8)


def device_formats(spec: ModelSpec, quantization: str | None) -> dict[str, str]:
    """Of every matrix of a model that is quantised, or is to be: what device_format says of its tensors."""
    formats = {}
    for name, shape in manifest(spec).items():
        if len(shape) > 1:
            chosen = None if quantization is None else quantized_format(name, shape, quantization)
            formats[name] = "bfloat16" if chosen is None else _FORMATS[chosen.name]
    return formats
