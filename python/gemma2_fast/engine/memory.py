"""How much memory there is for a cache, on the host and on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from gemma2_fast.engine.cache_plan import PAGE_TOKENS, plan_cache
from gemma2_fast.engine.gpu import Gpu
from gemma2_fast.errors import CapacityError
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.quantize import quantized_format

GPU_PAGE_TOKENS = 64  # P on a GPU, as in triton_kernels/attention_common.py
GPU_DRIVER_BYTES = 2**29  # of a GPU's memory: more than the driver should take for kernels and graphs


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """What a step may grow to."""

    max_seq_len: int
    max_sequences: int
    max_step_tokens: int
    max_logits_rows: int


@dataclass(frozen=True)
class CacheRoom:
    """free_bytes: what a cache may take if it is asked for; share: of that, what one of unstated size takes."""

    free_bytes: int
    share: float
    page_tokens: int


def host_room(spec: ModelSpec, quantization: str | None) -> CacheRoom:
    """CapacityError where quantising while loading takes more than there is."""
    quantized_bytes = _quantized_bytes(spec, quantization)
    free_bytes = free_memory_bytes() - quantized_bytes
    if free_bytes < 0:
        raise CapacityError(
            f"quantising while loading takes {quantized_bytes / 2**30:.1f} GiB, {-free_bytes / 2**30:.1f} GiB more "
            "than is free; run `gemma2-fast quantize` once: what it writes is mapped"
        )
    return CacheRoom(free_bytes, 0.5, PAGE_TOKENS)


def gpu_room(gpu: Gpu, spec: ModelSpec, formats: Mapping[str, str], limits: StepLimits) -> CacheRoom:
    """What the weights and the largest step leave, as the C++ core counts them. formats: of matrices on the device.

    CapacityError where they do not fit.
    """
    least_cache = plan_cache(
        spec,
        kv_dtype="bfloat16",
        max_seq_len=limits.max_seq_len,
        max_sequences=1,
        max_step_tokens=limits.max_step_tokens,
        page_tokens=GPU_PAGE_TOKENS,
    )
    largest_step = replace(least_cache, max_sequences=limits.max_sequences)
    step = gpu.step(spec, largest_step, formats, limits.max_logits_rows, allocates=False)
    needed_bytes, there = step.num_device_bytes - least_cache.num_bytes, gpu.device.free_bytes
    free_bytes = there - needed_bytes - GPU_DRIVER_BYTES
    if free_bytes < 0:
        step_bytes = needed_bytes - step.num_weight_bytes
        raise CapacityError(
            f"the weights take {step.num_weight_bytes / 2**30:.2f} GiB, a step of {limits.max_step_tokens} tokens "
            f"{step_bytes / 2**30:.2f} GiB and the driver up to {GPU_DRIVER_BYTES / 2**30:.2f} GiB, but "
            f"{gpu.device.name} has {there / 2**30:.2f} GiB free; lower max_step_tokens, use quantization='int8' or "
            "'int4', or backend=\"cpu\""
        )
    return CacheRoom(free_bytes, 0.9, GPU_PAGE_TOKENS)


def _quantized_bytes(spec: ModelSpec, quantization: str | None) -> int:
    """Memory that quantising while loading takes."""
    if quantization is None:
        return 0
    formats = {name: (quantized_format(name, shape, quantization), shape) for name, shape in manifest(spec).items()}
    return sum(target.num_bytes(shape) for target, shape in formats.values() if target is not None)


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
