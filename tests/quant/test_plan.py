"""What `quantization` and `activations` come to for every kind of checkpoint, and what a quantised model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_fast import Generator
from gemma2_fast.engine import memory
from gemma2_fast.engine.options import EngineOptions, EnginePlan, plan_engine
from gemma2_fast.errors import BackendError, CapacityError, RequestError
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.quantize import quantize_checkpoint
from gemma2_fast.weights.tensor import Tensor
from tests.support.checkpoints import generator
from tests.weights.quantized_files import CONFIG, write_source

SPEC = spec_from_config(CONFIG)
OURS_4 = ("INT4_G32", "INT8_G128")
GGUF = ("Q4_K", "Q6_K", "BF16")


def plan(formats: tuple[str, ...], **changes: Any) -> EnginePlan:
    return plan_engine(SPEC, formats, EngineOptions(max_seq_len=64, **changes))


@pytest.mark.parametrize(
    ("formats", "changes", "quantization", "activations"),
    [
        (("BF16",), {}, None, "float32"),
        (("BF16",), {"quantization": "int8"}, "int8", "int8"),
        (("F32", "F16"), {"quantization": "int4"}, "int4", "int8"),
        (("BF16",), {"quantization": "int8", "activations": "float32"}, "int8", "float32"),
        (("BF16",), {"quantization": "int8", "backend": "reference"}, "int8", "float32"),
        (("INT8_G128",), {}, None, "int8"),
        (("INT8_G128",), {"quantization": "int8"}, None, "int8"),
        (OURS_4, {"quantization": "int4"}, None, "int8"),
        (OURS_4[::-1], {"quantization": "int4", "activations": "int8"}, None, "int8"),
        (GGUF, {}, None, "int8"),
        (GGUF, {"activations": "float32"}, None, "float32"),
        (GGUF, {"backend": "reference"}, None, "float32"),
        (("BF16", "Q8_0"), {}, None, "int8"),
    ],
)
def test_choices(formats: tuple[str, ...], changes: dict[str, Any], quantization: str | None, activations: str) -> None:
    made = plan(formats, **changes)
    assert (made.quantization, made.activations) == (quantization, activations)


@pytest.mark.parametrize(
    ("formats", "changes", "error", "message"),
    [
        (OURS_4, {"quantization": "int8"}, RequestError, "checkpoint is already quantised to int4: leave quantization"),
        (("INT8_G128",), {"quantization": "int4"}, RequestError, "already quantised to int8"),
        (GGUF, {"quantization": "int8"}, RequestError, "needs weights in bfloat16.* stores Q4_K, Q6_K: leave"),
        (("F32", "Q8_0"), {"quantization": "int4"}, RequestError, "stores Q8_0"),
        (("BF16",), {"quantization": "int2"}, RequestError, "must be one of None, 'int8', 'int4', got 'int2'"),
        (("BF16",), {"activations": "fp8"}, RequestError, "one of 'auto', 'float32', 'int8', got 'fp8'"),
        (("BF16",), {"activations": "int8"}, RequestError, "activations='int8' needs quantised weights"),
        (GGUF, {"activations": "int8", "backend": "reference"}, BackendError, "'reference' computes in float"),
    ],
)
def test_refusals(formats: tuple[str, ...], changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(formats, **changes)


def test_a_model_is_the_same_whether_it_is_quantised_now_or_was_before() -> None:
    now, before = plan(("F32",), quantization="int4"), plan(OURS_4)
    assert now.cache.kv_dtype == before.cache.kv_dtype == "bfloat16"
    assert now.weight_dtype is before.weight_dtype is None
    assert plan(OURS_4, dtype="float32").cache.kv_dtype == "float32"
    assert plan(GGUF).cache.kv_dtype == "float32"


def test_quantising_while_loading_needs_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 50_000)
    with pytest.raises(CapacityError, match="more than is free; run `gemma2-fast quantize` once"):
        plan(("BF16",), quantization="int8")


PROMPT = [2, *range(5, 40)]


def logits(model: Path, **changes: Any) -> np.ndarray:
    with Generator.from_pretrained(
        model, max_batch_size=1, num_threads=2, kv_dtype="float32", progress=False, **changes
    ) as gen:
        return gen.logits(PROMPT)


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_reference_computes_with_the_dequantised_weights(quantization: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source")
    quantize_checkpoint(load_checkpoint(source), tmp_path / "copy", Origin(quantization, "here", "1"))
    weights = load_checkpoint(tmp_path / "copy").weights
    plain = {name: Tensor.from_float32(tensor.to_float32()) for name, tensor in weights.items()}
    with generator(SPEC, plain, backend="reference", max_batch_size=1) as gen:
        expected = gen.logits(PROMPT)
    got = logits(tmp_path / "copy", backend="reference")
    assert np.array_equal(got, expected)
    assert np.array_equal(logits(source, backend="reference", quantization=quantization), got)
    assert not np.array_equal(logits(source, backend="reference"), got)


@pytest.mark.parametrize("activations", ["float32", "int8"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_loading_a_copy_and_quantising_while_loading_are_the_same(
    quantization: str, activations: str, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    quantize_checkpoint(load_checkpoint(source), tmp_path / "copy", Origin(quantization, "here", "1"))
    got = logits(tmp_path / "copy", activations=activations)
    assert np.array_equal(got, logits(source, quantization=quantization, activations=activations))
    expected = logits(tmp_path / "copy", backend="reference")
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < (0.01 if activations == "float32" else 0.05)
