"""What the user asked for, and the plan it gives on this machine. Nothing is allocated here."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import Any

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan, plan_cache
from gemma2_fast.errors import BackendError, CapacityError, RequestError
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.quantize import QUANTIZATIONS, UNQUANTIZED, quantized_format, stored_quantization

DEFAULT_STEP_TOKENS = 512
# Rows of [L, V] float32 logits a step may yield; bounds what prompt logprobs and large batches hold at once.
LOGITS_ROWS, MAX_LOGITS_ROWS = 32, 128
# Share of the free memory that a cache of unstated size may take.
FREE_MEMORY_SHARE = 0.5

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
        _choice("backend", self.backend, ("auto", "cpu", "reference"), {"cuda": "this build has no GPU backend yet"})
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
    quantised matrices; all other products are float.
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


def plan_engine(spec: ModelSpec, matrix_formats: tuple[str, ...], options: EngineOptions) -> EnginePlan:
    """Resolve every "auto" and size the cache. `matrix_formats` are the checkpoint's, most bytes first.

    `weight_dtype` of the plan is the format that unquantised weights are converted to, None to keep them as stored.
    """
    backend = options.backend
    if backend == "auto":
        backend = "cpu"
        log.info("backend: cpu (this build has no other)")
    if backend == "reference" and find_spec("torch") is None:
        raise BackendError('backend="reference" needs PyTorch: pip install "gemma2-fast[torch]"')

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

    spec = spec.with_window(options.sliding_window)
    max_seq_len = options.max_seq_len or spec.max_positions
    if max_seq_len > spec.max_positions:
        if not spec.has_bounded_cache:
            raise RequestError(f"max_seq_len {max_seq_len} is more than the model's {spec.max_positions} positions")
        log.warning("max_seq_len %d is beyond the %d tokens of the model's training", max_seq_len, spec.max_positions)
    step_tokens = options.max_step_tokens or DEFAULT_STEP_TOKENS
    step_tokens = min(step_tokens, max_seq_len * options.max_batch_size)
    cache = _plan_cache(spec, options, kv_dtype, max_seq_len, step_tokens, _quantized_bytes(spec, quantization))
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
        max_logits_rows=min(max(LOGITS_ROWS, options.max_batch_size), MAX_LOGITS_ROWS),
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


def _quantized_bytes(spec: ModelSpec, quantization: str | None) -> int:
    """Memory that quantising while loading takes."""
    if quantization is None:
        return 0
    formats = {name: (quantized_format(name, shape, quantization), shape) for name, shape in manifest(spec).items()}
    return sum(target.num_bytes(shape) for target, shape in formats.values() if target is not None)


def _plan_cache(
    spec: ModelSpec, options: EngineOptions, kv_dtype: str, max_seq_len: int, step_tokens: int, weight_bytes: int
) -> CachePlan:
    """`weight_bytes` of memory are not there yet but spoken for."""
    free_bytes = free_memory_bytes() - weight_bytes
    if free_bytes < 0:
        raise CapacityError(
            f"quantising while loading takes {weight_bytes / 2**30:.1f} GiB, {-free_bytes / 2**30:.1f} GiB more than "
            "is free; run `gemma2-fast quantize` once: what it writes is mapped"
        )
    limit_bytes = int(free_bytes * FREE_MEMORY_SHARE)
    if options.kv_cache_gib is not None:
        limit_bytes = int(options.kv_cache_gib * 2**30)
        if limit_bytes > free_bytes:
            raise CapacityError(
                f"kv_cache_gib={options.kv_cache_gib:g} is more than the {free_bytes / 2**30:.1f} GiB of free memory"
            )

    def plan(limit: int | None) -> CachePlan:
        return plan_cache(
            spec,
            kv_dtype=kv_dtype,
            max_seq_len=max_seq_len,
            max_sequences=options.max_batch_size,
            max_step_tokens=step_tokens,
            limit_bytes=limit,
        )

    cache = plan(limit_bytes)
    wanted_bytes = plan(None).num_bytes
    if cache.num_bytes < wanted_bytes:
        log.warning(
            "cache cut from %.2f to %.2f GiB: %d sequences of %d tokens may have to wait for one another",
            wanted_bytes / 2**30,
            cache.num_bytes / 2**30,
            options.max_batch_size,
            max_seq_len,
        )
    return cache


def free_memory_bytes() -> int:
    """Memory that can be had without swapping: the kernel's estimate, or what the control group leaves of it."""
    with open("/proc/meminfo", encoding="ascii") as file:
        available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            limit = file.read().strip()
        with open("/sys/fs/cgroup/memory.current", encoding="ascii") as file:
            used = int(file.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
            # Cached files, mapped weights among them, count as used but can be dropped.
            used -= sum(int(line.split()[1]) for line in file if line.startswith(("active_file ", "inactive_file ")))
    except OSError:
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def _choice(name: str, value: Any, known: tuple[Any, ...], reasons: dict[str, str]) -> None:
    if value in known:
        return
    if isinstance(value, str) and value in reasons:
        raise BackendError(f"{name}={value!r}: {reasons[value]}")
    listed = ", ".join(repr(item) for item in (*known, *reasons))
    raise RequestError(f"{name} must be one of {listed}, got {value!r}")
