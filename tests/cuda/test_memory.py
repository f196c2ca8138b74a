"""What is planned of a GPU's memory is what is taken from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemma2_fast import Generator
from gemma2_fast.engine import gpu as gpu_backend
from gemma2_fast.engine import memory, options
from gemma2_fast.engine.device_weights import device_format, device_formats, device_parts
from gemma2_fast.engine.engine import start_engine
from gemma2_fast.engine.memory import GPU_DRIVER_BYTES
from gemma2_fast.engine.options import EngineOptions, EnginePlan, plan_engine
from gemma2_fast.errors import CapacityError, Gemma2FastError
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.quantize import quantize_weights
from tests.cuda.fake_gpu import FakeGpu
from tests.cuda.loop import Loop
from tests.cuda.models import PAGE, SmallModel, gpu_step, small_kernels, small_plan
from tests.golden.griffin_model import config
from tests.support.checkpoints import quantisable_spec, random_weights
from tests.support.tiny_models import TinyModel, tiny_model

HEAD_DIM = 32  # of which the plan's rows are a multiple, too
ENOUGH_BYTES = 2**40


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    directory = tmp_path_factory.mktemp("model")
    return tiny_model("gemma2", directory, dtype="bfloat16", head_dim=HEAD_DIM, num_hidden_layers=2)


@pytest.fixture(scope="module")
def recurrent() -> SmallModel:
    sizes = {"hidden_size": 64, "lru_width": 64, "num_attention_heads": 4, "head_dim": HEAD_DIM}
    spec = spec_from_config({**config(), **sizes, "intermediate_size": 96, "vocab_size": 512, "num_hidden_layers": 3})
    return SmallModel(spec, random_weights(spec, "BF16"))


def imagine(model: TinyModel | SmallModel, driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu(driver_library, small_kernels(model.spec), computes=False)
    monkeypatch.setattr(options, "DRIVER_LIBRARY", gpu.path)
    monkeypatch.setattr(gpu_backend, "kernel_images", lambda arch: gpu.images())
    monkeypatch.setattr(memory, "GPU_PAGE_TOKENS", PAGE)
    return gpu


def plan(model: TinyModel | SmallModel, **asked: Any) -> EnginePlan:
    sizes = {"max_seq_len": 64, "max_batch_size": 2, "max_step_tokens": 16}
    return plan_engine(model.spec, ("BF16",), EngineOptions(backend="cuda", **{**sizes, **asked}))


def taken_bytes(gpu: FakeGpu, model: TinyModel | SmallModel, plan: EnginePlan) -> int:
    start_engine(plan, model.weights).close()
    (taken,) = [int(call.split()[1]) for call in gpu.calls() if call.startswith("cuMemAlloc ")]
    return taken


def least_bytes(gpu: FakeGpu, model: TinyModel | SmallModel, **asked: Any) -> int:
    """Of memory, with which a cache of one byte would fit."""
    least, most = GPU_DRIVER_BYTES, ENOUGH_BYTES
    while most - least > 1:
        middle = (least + most) // 2
        gpu.library.fake_set(13000, 1, middle)
        try:
            plan(model, kv_cache_gib=1e-12, **asked)
        except CapacityError as error:
            if "GiB free" in str(error):
                least = middle
                continue
        most = middle
    gpu.library.fake_set(13000, 1, ENOUGH_BYTES)
    return most


SIZES: dict[str, dict[str, int]] = {
    "small": {},
    "long steps": {"max_step_tokens": 128},
    "many sequences": {"max_batch_size": 37},
    "long sequences": {"max_seq_len": 250},
}


@pytest.mark.parametrize("name", SIZES)
def test_planned_bytes_are_those_taken(
    name: str, attention: TinyModel, driver_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = imagine(attention, driver_library, monkeypatch)
    needed = least_bytes(gpu, attention, **SIZES[name]) - GPU_DRIVER_BYTES
    made = plan(attention, **SIZES[name])
    assert taken_bytes(gpu, attention, made) == needed + made.cache.num_bytes


def test_states_take_no_more_than_planned(
    recurrent: SmallModel, driver_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = imagine(recurrent, driver_library, monkeypatch)
    needed = least_bytes(gpu, recurrent) - GPU_DRIVER_BYTES
    made = plan(recurrent)
    assert made.cache.recurrent is not None
    planned = needed + made.cache.num_bytes
    assert (
        planned - made.cache.recurrent.num_slots * made.cache.recurrent.slot_bytes()
        < taken_bytes(gpu, recurrent, made)
        <= planned
    )


def test_a_cache_of_default_size_fits(
    attention: TinyModel, driver_library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little memory there is: either the plan says that it is too little, or it is enough."""
    gpu = imagine(attention, driver_library, monkeypatch)
    asked = {"max_batch_size": 40, "max_seq_len": 256}
    whole = plan(attention, **asked).cache
    needed, cut = least_bytes(gpu, attention, **asked), 0
    for cache_bytes in range(whole.num_bytes // 16, whole.num_bytes, whole.num_bytes // 8):
        there = needed + cache_bytes
        gpu.library.fake_set(13000, 1, there)
        made = plan(attention, **asked)
        cut += made.cache.num_bytes < whole.num_bytes
        gpu.library.fake_reset(gpu._callback)
        assert taken_bytes(gpu, attention, made) + GPU_DRIVER_BYTES <= there
    assert cut > 3


def test_a_model_that_does_not_fit(attention: TinyModel, driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = imagine(attention, driver_library, monkeypatch)
    needed = least_bytes(gpu, attention)
    gpu.library.fake_set(13000, 1, needed - 1)
    with pytest.raises(
        CapacityError,
        match=r"the weights take 0.00 GiB, a step of 16 tokens 0.00 GiB and the driver up to 0.50 GiB, but Imagined "
        r"GPU has 0.50 GiB free; lower max_step_tokens, use quantization='int8' or 'int4', or backend=\"cpu\"",
    ):
        plan(attention)
    with pytest.raises(CapacityError, match="a step of 16384 tokens 0.03"):
        plan(attention, max_step_tokens=2**14, max_batch_size=2**9)
    gpu.library.fake_set(13000, 1, needed)
    with pytest.raises(CapacityError, match="the cache of one sequence of 64 tokens needs 0.00 GiB"):
        plan(attention)
    assert not any(call.startswith("cuMemAlloc ") for call in gpu.calls())
    description = Generator.describe(attention.directory, backend="cuda", max_seq_len=64)
    assert description.problem is not None


def test_a_step_without_memory(attention: TinyModel, driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = imagine(attention, driver_library, monkeypatch)
    cache = small_plan(attention.spec)
    step = gpu_step(gpu, attention, cache, uploads=False, allocates=False)
    weights = [device_parts(tensor, name in step.float32_tensors) for name, tensor in attention.weights.items()]
    assert step.num_weight_bytes == sum(part.nbytes for parts in weights for part in parts.values())
    with pytest.raises(Gemma2FastError, match="final_norm came before memory was there"):
        step.upload("final_norm", "weight", device_parts(attention.weights["final_norm"], True)["weight"])
    with Loop(step, attention, cache) as loop:
        assert "the upload is not finished" in str(loop.events(loop.submit([2], max_tokens=1))[-1].message)


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("family", ["gemma2", "recurrent_gemma"])
def test_formats_that_are_planned_are_those_of_the_weights(family: str, quantization: str | None) -> None:
    spec = quantisable_spec(family)
    weights = random_weights(spec, "BF16")
    if quantization is not None:
        weights = quantize_weights(weights, quantization, num_threads=1, progress=False)
    matrices = {name: tensor for name, tensor in weights.items() if len(tensor.shape) > 1}
    assert device_formats(spec, quantization) == {name: device_format(tensor) for name, tensor in matrices.items()}
