"""What a model must move and compute at least, counted from its shapes."""

from __future__ import annotations

import math

from gemma2_fast.description import Description
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.errors import BackendError
from gemma2_fast.quant import FORMATS
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.quantize import UNQUANTIZED, quantized_format
from gemma2_fast.weights.tensor import Tensor


def weight_bytes(description: Description, quantization: str | None) -> int:
    """Bytes of all weights as they lie in memory: what a step reads once, with the tied embedding as the head."""

    def in_memory(name: str, tensor: Tensor) -> int:
        if quantization is None or tensor.format.name not in UNQUANTIZED:
            return tensor.num_bytes
        target = quantized_format(name, tensor.shape, quantization) or tensor.format
        return target.num_bytes(tensor.shape)

    return sum(in_memory(name, tensor) for name, tensor in description.checkpoint.weights.items())


def device_weight_bytes(spec: ModelSpec, quantization: str | None) -> int:
    """Bytes of all weights on a GPU: quantised where they can be, else bfloat16."""
    total = 0
    for name, shape in manifest(spec).items():
        chosen = None if quantization is None else quantized_format(name, shape, quantization)
        total += (chosen or FORMATS["BF16"]).num_bytes(shape)
    return total


def cache_bytes(cache: CachePlan, context: int) -> float:
    """Bytes of the keys, values and recurrent state that one sequence's step reads."""
    state = cache.recurrent.slot_bytes() if cache.recurrent else 0
    return state + sum(
        group.block_bytes(cache.kv_dtype, cache.page_tokens)
        / cache.page_tokens
        * min(context, group.window_keys or context)
        for group in cache.paged
    )


def block_operations(spec: ModelSpec) -> int:
    """Operations of the block matrices for one token, without attention and head; a multiply-add counts as two."""
    return 2 * sum(
        math.prod(shape)
        for name, shape in manifest(spec).items()
        if len(shape) > 1 and name != "embedding" and not name.endswith("_bias")
    )


def cache_of(description: Description) -> CachePlan:
    if description.plan is None:
        raise BackendError(f"{description.checkpoint.path} cannot run here: {description.problem}")
    return description.plan.cache
