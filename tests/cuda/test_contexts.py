"""The context of a thread: a program may use another GPU, or another library, beside ours. That each test leaves
everything as it was is checked by conftest.py."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from gemma2_fast.errors import Gemma2FastError
from tests.cuda.conftest import ANOTHERS_CONTEXT
from tests.cuda.fake_gpu import FakeGpu
from tests.cuda.loop import Loop
from tests.cuda.models import gpu_step, small_kernels, small_plan
from tests.support.tiny_models import TinyModel, tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("gemma2", tmp_path_factory.mktemp("model"), dtype="bfloat16", head_dim=16, num_hidden_layers=1)


@pytest.fixture
def gpu(model: TinyModel, driver_library: Path) -> FakeGpu:
    return FakeGpu(driver_library, small_kernels(model.spec), computes=False)


def current_context(gpu: FakeGpu) -> int | None:
    context = ctypes.c_void_p()
    assert gpu.library.cuCtxPopCurrent_v2(ctypes.byref(context)) == 0
    assert gpu.library.cuCtxPushCurrent_v2(context) == 0
    return context.value


def test_every_call_puts_the_context_back(gpu: FakeGpu, model: TinyModel) -> None:
    plan = small_plan(model.spec)
    device = gpu.device()
    assert current_context(gpu) == ANOTHERS_CONTEXT
    assert device.free_bytes > 0
    assert current_context(gpu) == ANOTHERS_CONTEXT
    step = gpu_step(gpu, model, plan)
    assert current_context(gpu) == ANOTHERS_CONTEXT
    with Loop(step, model, plan) as loop:
        del step
        loop.events(loop.submit([2, 3], max_tokens=2))
        loop.events(loop.submit([2], max_tokens=2, logprobs=True))
    assert current_context(gpu) == ANOTHERS_CONTEXT


# Functions, and how many of their calls succeed before.
FAILURES = (
    ("cuCtxPushCurrent", 0), ("cuModuleLoadData", 0), ("cuModuleLoadData", 5), ("cuModuleGetFunction", 5),
    ("cuMemHostAlloc", 0), ("cuMemHostAlloc", 1), ("cuMemHostAlloc", 3), ("cuStreamCreate", 0), ("cuMemAlloc", 0),
    ("cuMemsetD8Async", 0), ("cuEventCreate", 0), ("cuEventCreate", 1), ("cuEventRecord", 0), ("cuEventRecord", 3),
    ("cuMemcpyHtoDAsync", 0), ("cuMemcpyHtoDAsync", 3),
)  # fmt: skip


@pytest.mark.parametrize(("function", "after"), FAILURES)
def test_a_step_that_cannot_be_made(gpu: FakeGpu, model: TinyModel, function: str, after: int) -> None:
    gpu.fail(function, after, 999)
    with pytest.raises(Gemma2FastError, match="CUDA: unknown error 999 while "):
        gpu_step(gpu, model, small_plan(model.spec))
    gpu.library.fake_recover()
    assert current_context(gpu) == ANOTHERS_CONTEXT
