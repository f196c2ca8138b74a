"""The GPU backend: a GPU with its kernels, and steps on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.core_types import core_cache_plan, core_spec
from gemma2_fast.engine.device_weights import device_format, device_parts
from gemma2_fast.engine.gpu_kernels import kernel_images
from gemma2_fast.spec import ModelSpec
from gemma2_fast.weights.prefault import byte_bar
from gemma2_fast.weights.tensor import Tensor


@dataclass(frozen=True)
class Gpu:
    device: _core.CudaDevice
    kernels: list[_core.KernelImage] = field(repr=False)

    def step(
        self,
        spec: ModelSpec,
        cache: CachePlan,
        formats: Mapping[str, str],
        max_logits_rows: int,
        allocates: bool = True,
    ) -> _core.GraphStep:
        """Of a model that is not there yet. formats: of its matrices; allocates: False to ask for sizes only."""
        return _core.GraphStep(
            device=self.device,
            spec=core_spec(spec),
            plan=core_cache_plan(cache),
            formats=formats,
            kernels=self.kernels,
            max_step_tokens=cache.max_step_tokens,
            max_logits_rows=max_logits_rows,
            max_sequences=cache.max_sequences,
            max_seq_len=cache.max_seq_len,
            allocates=allocates,
        )


def open_gpu(driver_library: str) -> Gpu:
    """The first one. BackendError where there is none, no recent driver or no kernels."""
    device = _core.CudaDevice(driver_library=driver_library, ordinal=0)
    return Gpu(device, kernel_images(device.arch))


def gpu_step(
    gpu: Gpu,
    spec: ModelSpec,
    cache: CachePlan,
    max_logits_rows: int,
    weights: Mapping[str, Tensor],
    progress: bool,
) -> _core.GraphStep:
    """Ready to run."""
    formats = {name: device_format(tensor) for name, tensor in weights.items() if len(tensor.shape) > 1}
    step = gpu.step(spec, cache, formats, max_logits_rows)
    with byte_bar("uploading", weights, progress) as bar:
        for name, tensor in weights.items():
            for part, data in device_parts(tensor, name in step.float32_tensors).items():
                step.upload(name, part, data)
            bar.update(tensor.num_bytes)
    step.finish_upload()
    return step
