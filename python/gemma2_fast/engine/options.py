"""What the user asked for, and the plan it gives on this machine. Nothing is allocated here."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan, plan_cache
from gemma2_fast.engine.device_weights import device_formats
from gemma2_fast.engine.gpu import Gpu, open_gpu
from gemma2_fast.engine.memory import CacheRoom, StepLimits, gpu_room, host_room
from gemma2_fast.errors import BackendError, CapacityError, RequestError
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.quantize import QUANTIZATIONS, UNQUANTIZED, stored_quantization

DEFAULT_STEP_TOKENS, DEFAULT_GPU_STEP_TOKENS = 512, 2048
# Rows of [L, V] float32 logits a step may yield; bounds what prompt logprobs and large batches hold at once.
LOGITS_ROWS, MAX_LOGITS_ROWS = 32, 128
DRIVER_LIBRARY = "libcuda.so.1"

log = logging.getLogger("gemma2_fast")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """The keyword arguments of Generator.from_pretrained that shape the engine; see there."""

    backend: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    activations: str = "auto"
    kv_dtype: str = "auto"
    max_seq_len: int | None = None
    max_batch_size: int = 8
    max_step_tokens: int | None = None
    kv_cache_gib: float | None = None
    num_threads: int | None = None
    sliding_window: int | None = None
    instruction_set: str = "auto"

    def __post_init__(self) -> None:
        _choice("backend", self.backend, ("auto", "cpu", "cuda", "reference"), {})
        _choice("dtype", self.dtype, ("auto", "float32", "bfloat16"), {"float16": "Gemma's activations overflow it"})
        _choice("quantization", self.quantization, (None, *QUANTIZATIONS), {})
        _choice("activations", self.activations, ("auto", "float32", "int8"), {})
        _choice("kv_dtype", self.kv_dtype, ("auto", "float32", "bfloat16", "int8"), {})
        for name in ("max_seq_len", "max_batch_size", "max_step_tokens", "num_threads", "sliding_window"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31):
                raise RequestError(f"{name} must be a positive whole number, got {value!r}")
        number = isinstance(self.kv_cache_gib, int | float) and not isinstance(self.kv_cache_gib, bool)
        if self.kv_cache_gib is not None and not (number and 0 < self.kv_cache_gib < 2**20):
            raise RequestError(f"kv_cache_gib must be a positive number, got {self.kv_cache_gib!r}")

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> EngineOptions:
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(keywords) - set(known))
        if unknown:
            raise RequestError(f"unknown options: {', '.join(unknown)}; known: {', '.join(known)}")
        return cls(**keywords)


@dataclass(frozen=True)
class EnginePlan:
    """Every choice made: `spec` has the window in force, `compute_dtype` is that of everything but matrix products.

    quantization: what unquantised matrices become while they are loaded. activations: their type in products with
    quantised matrices; all other products are float. gpu: what the backend "cuda" runs on, None for others.
    """

    spec: ModelSpec
    backend: str
    weight_dtype: str | None
    quantization: str | None
    compute_dtype: str
    activations: str
    instruction_set: str
    num_threads: int
    cache: CachePlan
    max_logits_rows: int
    gpu: Gpu | None = None


def plan_engine(spec: ModelSpec, matrix_formats: tuple[str, ...], options: EngineOptions) -> EnginePlan:
    """Resolve every "auto" and size the cache. `matrix_formats` are the checkpoint's, most bytes first.

    `weight_dtype` of the plan is the format that unquantised weights are converted to, None to keep them as stored.
    """
    backend = options.backend
    if backend == "auto":
        backend = "cpu"
        log.info('backend: cpu (the other, "cuda", is chosen by name: no card has run it yet)')
    if backend == "reference" and find_spec("torch") is None:
        raise BackendError('backend="reference" needs PyTorch: pip install "gemma2-fast[torch]"')

    if backend == "cuda":
        _refuse_on_gpu(options)

    stored = matrix_formats[0]
    dtype = options.dtype
    quantization = _quantization(matrix_formats, options.quantization)
    ours = quantization is not None or stored_quantization(matrix_formats) is not None
    convertible = quantization is None and stored in ("F32", "F16")
    weight_dtype = "BF16" if dtype == "bfloat16" and convertible else None
    if dtype == "auto":
        # The same whether a model is quantised now or was before: nearly all of them are bfloat16 at their source.
        dtype = "bfloat16" if stored == "BF16" or ours else "float32"
    activations = _activations(options.activations, backend, ours or any(f not in UNQUANTIZED for f in matrix_formats))
    kv_dtype = dtype if options.kv_dtype == "auto" else options.kv_dtype
    compute_dtype = "bfloat16" if backend == "reference" and options.dtype == "bfloat16" else "float32"
    if backend == "cuda":
        weight_dtype, activations, kv_dtype, compute_dtype = None, "bfloat16", "bfloat16", "bfloat16"

    spec = spec.with_window(options.sliding_window)
    max_seq_len = options.max_seq_len or spec.max_positions
    if max_seq_len > spec.max_positions:
        if not spec.has_bounded_cache:
            raise RequestError(f"max_seq_len {max_seq_len} is more than the model's {spec.max_positions} positions")
        log.warning("max_seq_len %d is beyond the %d tokens of the model's training", max_seq_len, spec.max_positions)
    step_tokens = options.max_step_tokens or (DEFAULT_GPU_STEP_TOKENS if backend == "cuda" else DEFAULT_STEP_TOKENS)
    limits = StepLimits(
        max_seq_len=max_seq_len,
        max_sequences=options.max_batch_size,
        max_step_tokens=min(step_tokens, max_seq_len * options.max_batch_size),
        max_logits_rows=min(max(LOGITS_ROWS, options.max_batch_size), MAX_LOGITS_ROWS),
    )
    room = host_room(spec, quantization)
    gpu = open_gpu(DRIVER_LIBRARY) if backend == "cuda" else None
    if gpu is not None:
        room = gpu_room(gpu, spec, device_formats(spec, quantization or stored_quantization(matrix_formats)), limits)
    cache = _plan_cache(spec, options, kv_dtype, limits, room)
    return EnginePlan(
        spec=spec,
        backend=backend,
        weight_dtype=weight_dtype,
        quantization=quantization,
        compute_dtype=compute_dtype,
        activations=activations,
        instruction_set=_core.choose_instruction_set(options.instruction_set),
        num_threads=options.num_threads or len(os.sched_getaffinity(0)),
        cache=cache,
        max_logits_rows=limits.max_logits_rows,
        gpu=gpu,
    )


def _quantization(matrix_formats: tuple[str, ...], wanted: str | None) -> str | None:
    """What is left to be quantised: nothing where the checkpoint is stored so already."""
    quantized = [name for name in matrix_formats if name not in UNQUANTIZED]
    if wanted is None or not quantized:
        return wanted
    stored = stored_quantization(matrix_formats)
    if stored == wanted:
        return None
    is_stored = f"is already quantised to {stored}" if stored else f"stores {', '.join(quantized)}"
    raise RequestError(
        f"quantization={wanted!r} needs weights in bfloat16, float16 or float32, but this checkpoint {is_stored}: "
        "leave quantization out, or load the checkpoint that this one was made from"
    )


def _refuse_on_gpu(options: EngineOptions) -> None:
    """A GPU computes in bfloat16 with sums in float32, and keeps keys and values in bfloat16."""
    for name in ("dtype", "kv_dtype", "activations"):
        if (value := getattr(options, name)) not in ("auto", "bfloat16"):
            raise BackendError(f'{name}={value!r}: backend="cuda" computes in bfloat16; leave it "auto"')


def _activations(wanted: str, backend: str, quantized: bool) -> str:
    if wanted == "float32" or (wanted == "auto" and not (quantized and backend == "cpu")):
        return "float32"
    if backend != "cpu":
        raise BackendError(f"activations='int8': backend={backend!r} computes in float; use 'float32' or backend='cpu'")
    if not quantized:
        raise RequestError(
            "activations='int8' needs quantised weights: give quantization='int8' or 'int4', or a quantised checkpoint"
        )
    return "int8"


def _plan_cache(
    spec: ModelSpec, options: EngineOptions, kv_dtype: str, limits: StepLimits, room: CacheRoom
) -> CachePlan:
    limit_bytes = int(room.free_bytes * room.share)
    if options.kv_cache_gib is not None:
        limit_bytes = int(options.kv_cache_gib * 2**30)
        if limit_bytes > room.free_bytes:
            raise CapacityError(
                f"kv_cache_gib={options.kv_cache_gib:g} is more than the {room.free_bytes / 2**30:.1f} GiB of free "
                "memory"
            )

    def plan(limit: int | None) -> CachePlan:
        return plan_cache(
            spec,
            kv_dtype=kv_dtype,
            max_seq_len=limits.max_seq_len,
            max_sequences=limits.max_sequences,
            max_step_tokens=limits.max_step_tokens,
            page_tokens=room.page_tokens,
            limit_bytes=limit,
        )

    cache = plan(limit_bytes)
    wanted_bytes = plan(None).num_bytes
    if cache.num_bytes < wanted_bytes:
        log.warning(
            "cache cut from %.2f to %.2f GiB: %d sequences of %d tokens may have to wait for one another",
            wanted_bytes / 2**30,
            cache.num_bytes / 2**30,
            limits.max_sequences,
            limits.max_seq_len,
        )
    return cache


def _choice(name: str, value: Any, known: tuple[Any, ...], reasons: dict[str, str]) -> None:
    if value in known:
        return
    if isinstance(value, str) and value in reasons:
        raise BackendError(f"{name}={value!r}: {reasons[value]}")
    listed = ", ".join(repr(item) for item in (*known, *reasons))
    raise RequestError(f"{name} must be one of {listed}, got {value!r}")
