"""Every mutated weight file that still loads as a model also runs: one prompt, one decoded token, no crash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gemma2_fast import Generator
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.gguf import read_gguf
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.names import hf_names
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.quantize import quantize_checkpoint
from gemma2_fast.weights.safetensors import read_safetensors
from gemma2_fast.weights.writer import write_safetensors
from tests.spec.configs import gemma2
from tests.support.checkpoints import random_weights
from tests.support.gguf_writer import write_gguf
from tests.weights.parser_fuzz import fuzz_parser, mutated_gguf, mutated_safetensors, num_fuzz_files
from tests.weights.quantized_files import write_source

CONFIG = {**gemma2(2, 32, 2, 1, 16, 32, 16), "vocab_size": 24, "sliding_window": 8, "max_position_embeddings": 64}


class Steps:
    """Runs the model at `path` and counts those that ran to the end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.completed = 0

    def __call__(self, _: object) -> None:
        with Generator.from_pretrained(self.path, num_threads=1, max_batch_size=1, max_seq_len=64) as gen:
            gen.generate([2, 5, 7] * 4, max_tokens=2)
            self.completed += 1


def test_mutated_gguf_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"
    spec = spec_from_config(CONFIG)
    write_gguf(path, "gemma2", spec, random_weights(spec, "Q8_0"))
    steps = Steps(path)
    outcome = fuzz_parser(mutated_gguf(path.read_bytes()), read_gguf, steps, path)
    with capsys.disabled():
        print(f"\ngguf models: {outcome}, {steps.completed} ran")
    assert steps.completed >= num_fuzz_files() // 20


def test_mutated_safetensors_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    spec = spec_from_config(CONFIG)
    names = hf_names(spec, ())
    weights = random_weights(spec, "BF16")
    write_safetensors(path, {names[name]: tensor for name, tensor in weights.items()}, {})
    steps = Steps(tmp_path)
    outcome = fuzz_parser(mutated_safetensors(path.read_bytes()), read_safetensors, steps, path)
    with capsys.disabled():
        print(f"\nsafetensors models: {outcome}, {steps.completed} ran")
    assert steps.completed >= num_fuzz_files() // 20


def test_mutated_quantized_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_source(tmp_path / "source", config=CONFIG)
    quantize_checkpoint(load_checkpoint(source), tmp_path / "copy", Origin("int4", "source", "0.1.0"))
    path = tmp_path / "copy" / "model.safetensors"
    steps = Steps(path.parent)
    outcome = fuzz_parser(mutated_safetensors(path.read_bytes()), read_safetensors, steps, path)
    with capsys.disabled():
        print(f"\nquantised models: {outcome}, {steps.completed} ran")
    assert steps.completed >= num_fuzz_files() // 20
