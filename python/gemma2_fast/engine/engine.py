"""Joins a backend to the C++ decode loop."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gemma2_fast import _core
from gemma2_fast.engine.core_types import core_cache_plan, core_spec
from gemma2_fast.engine.gpu import gpu_step
from gemma2_fast.engine.options import EnginePlan
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.mapped_file import drop_pages
from gemma2_fast.weights.prefault import byte_bar
from gemma2_fast.weights.quantize import quantize_weights
from gemma2_fast.weights.tensor import Tensor

Weights = Mapping[str, Tensor]


def start_engine(plan: EnginePlan, weights: Weights, progress: bool = False) -> _core.DecodeLoop:
    """Build the backend's step and start the loop that drives it."""
    if plan.quantization is not None:
        weights = quantize_weights(weights, plan.quantization, plan.num_threads, progress)
    if plan.weight_dtype is not None:
        weights = _all_converted(weights, plan.weight_dtype, progress)
    cache = core_cache_plan(plan.cache)
    step: _core.ModelStep
    if plan.backend == "cpu":
        step = cpu_step(plan, weights, cache)
    elif plan.gpu is not None:
        step = gpu_step(plan.gpu, plan.spec, plan.cache, plan.max_logits_rows, weights, progress)
    else:
        # Only this backend needs torch.
        from gemma2_fast.reference import DTYPES, ReferenceModel, ReferenceStep

        model = ReferenceModel(plan.spec, weights, DTYPES[plan.compute_dtype])
        step = _core.CallbackStep(ReferenceStep(model, plan.cache).run)
    limits = _core.Limits(
        max_running_sequences=plan.cache.max_sequences,
        max_step_tokens=plan.cache.max_step_tokens,
        max_seq_len=plan.cache.max_seq_len,
        max_logits_rows=plan.max_logits_rows,
        vocab_size=plan.spec.vocab_size,
        final_softcap=plan.spec.final_softcap,
    )
    return _core.DecodeLoop(step, cache, limits)


def cpu_step(plan: EnginePlan, weights: Weights, cache: _core.CachePlan) -> _core.CpuStep:
    """The C++ CPU backend over memory-mapped weights.

    For int8 activations it has made its own strips of GGUF's quantised matrices, whose pages are then given back.
    """
    step = _core.CpuStep(
        spec=core_spec(plan.spec),
        weights={name: (tensor.format.name, tensor.shape, tensor.data) for name, tensor in weights.items()},
        plan=cache,
        activations=plan.activations,
        kv_dtype=plan.cache.kv_dtype,
        instruction_set=plan.instruction_set,
        num_threads=plan.num_threads,
        max_step_tokens=plan.cache.max_step_tokens,
        max_logits_rows=plan.max_logits_rows,
    )
    if plan.activations == "int8":
        for tensor in weights.values():
            if tensor.format.gguf_type is not None:
                drop_pages(tensor.data)
    return step


def _all_converted(weights: Weights, format_name: str, progress: bool) -> Weights:
    converted = {}
    with byte_bar("converting", weights, progress) as bar:
        for name, tensor in weights.items():
            converted[name] = tensor if name.endswith("_bias") else _converted(tensor, format_name)
            bar.update(tensor.num_bytes)
    return converted


def _converted(tensor: Tensor, format_name: str) -> Tensor:
    """The tensor in another unquantised format; vectors stay as they are."""
    target = FORMATS[format_name]
    if len(tensor.shape) < 2 or tensor.format is target or target.pack is None:
        return tensor
    blocks = tensor.to_float32().reshape(-1, target.block_weights)
    return Tensor(tensor.shape, target, np.ascontiguousarray(target.pack(blocks)).reshape(-1))
