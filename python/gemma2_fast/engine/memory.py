"""How much memory there is for a cache, on the host and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import PAGE_TOKENS
from gemma2_fast.engine.device_weights import device_weight_bytes
from gemma2_fast.errors import CapacityError
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.quantize import quantized_format

GPU_PAGE_TOKENS = 64  # P on a GPU, as in triton_kernels/attention_common.py
# Of a GPU's memory: activations of a step, logits, and what the driver takes for kernels and graphs.
GPU_RESERVE_BYTES = 2**30


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


def gpu_room(gpu: _core.CudaDevice, spec: ModelSpec, stored: str, quantization: str | None) -> CacheRoom:
    """CapacityError where the weights do not fit, or the host has no room to quantise them."""
    host_room(spec, quantization)
    weight_bytes, there = device_weight_bytes(spec, stored, quantization), gpu.free_bytes
    free_bytes = there - weight_bytes - GPU_RESERVE_BYTES
    if free_bytes < 0:
        raise CapacityError(
            f"the weights take {weight_bytes / 2**30:.1f} GiB, but {gpu.name} has {there / 2**30:.1f} GiB free, of "
            f"which {GPU_RESERVE_BYTES / 2**30:.0f} GiB are for activations; use quantization='int8' or 'int4', or "
            'backend="cpu"'
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
