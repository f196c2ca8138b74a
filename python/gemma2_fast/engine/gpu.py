"""The GPU backend, with every weight copied up."""

from __future__ import annotations

from collections.abc import Mapping

from gemma2_fast import _core
from gemma2_fast.engine.device_weights import device_format, device_parts
from gemma2_fast.engine.options import EnginePlan
from gemma2_fast.weights.prefault import byte_bar
from gemma2_fast.weights.tensor import Tensor


def gpu_step(
    gpu: _core.CudaDevice,
    kernels: list[_core.KernelImage],
    plan: EnginePlan,
    spec: _core.ModelSpec,
    cache: _core.CachePlan,
    weights: Mapping[str, Tensor],
    progress: bool,
) -> _core.GraphStep:
    """The C++ GPU backend, ready to run."""
    step = _core.GraphStep(
        device=gpu,
        spec=spec,
        plan=cache,
        formats={name: device_format(tensor) for name, tensor in weights.items() if len(tensor.shape) > 1},
        kernels=kernels,
        max_step_tokens=plan.cache.max_step_tokens,
        max_logits_rows=plan.max_logits_rows,
        max_sequences=plan.cache.max_sequences,
        max_seq_len=plan.cache.max_seq_len,
    )
    with byte_bar("uploading", weights, progress) as bar:
        for name, tensor in weights.items():
            for part, data in device_parts(tensor, name in step.float32_tensors).items():
                step.upload(name, part, data)
            bar.update(tensor.num_bytes)
    step.finish_upload()
    return step
