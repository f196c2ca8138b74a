"""The public face over the imagined GPU, and what it says where a GPU cannot do what is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_fast import Generator, SamplingParams
from gemma2_fast.engine import gpu as gpu_backend
from gemma2_fast.engine import memory, options
from gemma2_fast.errors import BackendError, CapacityError, Gemma2FastError
from tests.cuda.fake_gpu import FakeGpu, teach_bfloat16
from tests.cuda.models import PAGE, small_kernels
from tests.support.tiny_models import TinyModel, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return tiny_model("gemma2", tmp_path_factory.mktemp("model"), dtype="bfloat16", head_dim=16, num_hidden_layers=2)


@pytest.fixture
def gpu(model: TinyModel, driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    teach_bfloat16(monkeypatch)
    gpu = FakeGpu(driver_library, small_kernels(model.spec))
    monkeypatch.setattr(options, "DRIVER_LIBRARY", gpu.path)
    monkeypatch.setattr(gpu_backend, "kernel_images", lambda arch: gpu.images())
    monkeypatch.setattr(memory, "GPU_PAGE_TOKENS", PAGE)
    return gpu


def open_model(model: TinyModel, **keywords: Any) -> Generator:
    sizes = {"max_seq_len": 64, "max_batch_size": 2, "max_step_tokens": 16}
    return Generator.from_pretrained(model.directory, backend="cuda", progress=False, **{**sizes, **keywords})


@pytest.mark.slow
def test_the_whole_face(gpu: FakeGpu, model: TinyModel) -> None:
    """Batches, samples, streams, logits and scores agree with one another."""
    prompt, other = [2, 17, 300], [2, 5]
    with open_model(model) as generator:
        assert generator.backend == "cuda"
        first, second = generator.generate([prompt, other], max_tokens=3)
        assert [chunk.token_ids for chunk in generator.stream(prompt, max_tokens=3)] == [(i,) for i in first.token_ids]
        two = generator.generate(other, SamplingParams(temperature=1.0, n=2, seed=3, max_tokens=2, logprobs=1))
        logits = generator.logits(prompt)
        np.testing.assert_allclose(generator.score(prompt), log_softmax(logits)[[0, 1], prompt[1:]], atol=1e-5)
    assert first.token_ids[0] == logits[-1].argmax()
    assert second.token_ids != first.token_ids
    assert two[0].token_ids != two[1].token_ids
    assert all(sample.logprobs is not None for sample in two)


def log_softmax(logits: Any) -> Any:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_what_info_says(gpu: FakeGpu, model: TinyModel) -> None:
    text = "\n".join(Generator.describe(model.directory, backend="cuda", max_seq_len=64).lines())
    assert "backend       cuda, Imagined GPU (sm_90), bfloat16 activations" in text
    assert f"pages of {PAGE}, steps of up to 512 tokens" in text


@pytest.mark.parametrize("asked", [{"dtype": "float32"}, {"kv_dtype": "int8"}, {"kv_dtype": "float32"}])
def test_types_that_a_gpu_does_not_compute(gpu: FakeGpu, model: TinyModel, asked: dict[str, str]) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(BackendError, match=f'{name}=\'{value}\': backend="cuda" computes in bfloat16; leave it "auto"'):
        open_model(model, **asked)
    with pytest.raises(BackendError, match="activations='int8'"):
        open_model(model, activations="int8")


def test_a_model_that_does_not_fit(gpu: FakeGpu, model: TinyModel) -> None:
    gpu.library.fake_set(13000, 1, 2**29)
    with pytest.raises(CapacityError, match=r"the driver up to 0.50 GiB, but Imagined GPU has 0.50 GiB free"):
        open_model(model)
    assert not any(call.startswith("cuMemAlloc ") for call in gpu.calls())


def test_no_gpu(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "DRIVER_LIBRARY", "libnothing.so.1")
    with pytest.raises(BackendError, match="no CUDA driver: libnothing.so.1"):
        open_model(model)


def test_a_kernel_that_was_not_compiled(gpu: FakeGpu, model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_backend, "kernel_images", lambda arch: gpu.images()[:1])
    with pytest.raises(Gemma2FastError, match="no kernel .* is compiled for"):
        open_model(model)
