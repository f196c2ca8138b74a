"""Joins a backend to the C++ decode loop."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.gpu import gpu_step
from gemma2_fast.engine.gpu_kernels import kernel_images
from gemma2_fast.engine.options import EnginePlan
from gemma2_fast.quant import FORMATS
from gemma2_fast.spec import AttentionSpec, LayerSpec, ModelSpec, RecurrentSpec
from gemma2_fast.weights.mapped_file import drop_pages
from gemma2_fast.weights.prefault import byte_bar
from gemma2_fast.weights.quantize import quantize_weights
from gemma2_fast.weights.tensor import Tensor

Weights = Mapping[str, Tensor]


def start_engine(plan: EnginePlan, weights: Weights, progress: bool = False) -> _core.DecodeLoop:
    """Build the backend's step and start the loop that drives it."""
    kernels = [] if plan.gpu is None else kernel_images(plan.gpu.arch)  # first: what is missing should not come late
    if plan.quantization is not None:
        weights = quantize_weights(weights, plan.quantization, plan.num_threads, progress)
    if plan.weight_dtype is not None:
        weights = _all_converted(weights, plan.weight_dtype, progress)
    cache = core_cache_plan(plan.cache)
    step: _core.ModelStep
    if plan.backend == "cpu":
        step = cpu_step(plan, weights, cache)
    elif plan.gpu is not None:
        step = gpu_step(plan.gpu, kernels, plan, core_spec(plan.spec), cache, weights, progress)
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


def core_cache_plan(plan: CachePlan) -> _core.CachePlan:
    """The C++ mirror of a cache plan."""
    paged = [
        _core.PagedKvGroup(
            layers=list(group.layers),
            num_kv_heads=group.num_kv_heads,
            head_dim=group.head_dim,
            window_keys=group.window_keys,
            num_blocks=group.num_blocks,
            table_width=group.table_width,
        )
        for group in plan.paged
    ]
    recurrent = None
    if plan.recurrent is not None:
        recurrent = _core.RecurrentStateGroup(
            layers=list(plan.recurrent.layers),
            width=plan.recurrent.width,
            conv_tail=plan.recurrent.conv_tail,
            num_slots=plan.recurrent.num_slots,
            num_snapshots=plan.recurrent.num_snapshots,
        )
    return _core.CachePlan(page_tokens=plan.page_tokens, paged=paged, recurrent=recurrent)


def core_spec(spec: ModelSpec) -> _core.ModelSpec:
    return _core.ModelSpec(
        model_width=spec.model_width,
        vocab_size=spec.vocab_size,
        embedding_scale=spec.embedding_scale,
        norm_epsilon=spec.norm_epsilon,
        final_softcap=spec.final_softcap,
        layers=[_core_layer(layer) for layer in spec.layers],
    )


def _core_layer(layer: LayerSpec) -> _core.LayerSpec:
    return _core.LayerSpec(
        mixer=_core_mixer(layer.mixer),
        mlp_width=layer.mlp.width,
        mlp_bias=layer.mlp.bias,
        norm_after_mixer=layer.norms.after_mixer,
        norm_after_mlp=layer.norms.after_mlp,
    )


def _core_mixer(mixer: AttentionSpec | RecurrentSpec) -> _core.AttentionSpec | _core.RecurrentSpec:
    match mixer:
        case AttentionSpec():
            return _core.AttentionSpec(
                num_query_heads=mixer.num_query_heads,
                num_kv_heads=mixer.num_kv_heads,
                head_dim=mixer.head_dim,
                query_scale=mixer.query_scale,
                score_softcap=mixer.score_softcap,
                window_keys=mixer.window_keys,
                qk_norm=mixer.qk_norm,
                output_bias=mixer.output_bias,
                inverse_frequencies=mixer.rope.inverse_frequencies(),
            )
        case RecurrentSpec():
            return _core.RecurrentSpec(
                width=mixer.width, num_gate_blocks=mixer.num_gate_blocks, conv_width=mixer.conv_width
            )


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
