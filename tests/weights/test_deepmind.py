"""DeepMind's tensors become Hugging Face's: names, and the three that are laid out otherwise."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma2_fast.errors import WeightsError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.deepmind import as_hugging_face
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.quantize import quantize_checkpoint
from gemma2_fast.weights.safetensors import read_safetensors_directory
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors
from tests.golden import griffin_model


def numbers(*shape: int) -> Tensor:
    return Tensor.from_float32(np.arange(np.prod(shape), dtype=np.float32).reshape(shape), FORMATS["BF16"])


def test_layouts_by_hand() -> None:
    stored = {
        "blocks.3.mlp_block.ffw_up.w": numbers(2, 2, 3),
        "blocks.3.mlp_block.ffw_up.b": numbers(2, 1, 1, 3),
        "blocks.12.recurrent_block.conv_1d.w": numbers(4, 2),
        "blocks.12.recurrent_block.rg_lru.a_gate.w": numbers(2, 2, 2),
    }
    found = {name: tensor.to_float32().tolist() for name, tensor in as_hugging_face(stored).items()}
    assert found == {
        "model.layers.3.mlp_block.gate_proj.weight": [[0, 3], [1, 4], [2, 5]],
        "model.layers.3.mlp_block.up_proj.weight": [[6, 9], [7, 10], [8, 11]],
        "model.layers.3.mlp_block.gate_proj.bias": [0, 1, 2],
        "model.layers.3.mlp_block.up_proj.bias": [3, 4, 5],
        "model.layers.12.temporal_block.conv_1d.weight": [[[0, 2, 4, 6]], [[1, 3, 5, 7]]],
        "model.layers.12.temporal_block.rg_lru.recurrent_gate_weight": [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
    }


def test_unknown_names_stay() -> None:
    for name in ("blocks.0.mlp_block.extra", "opt_state.0", "blocks.0"):
        assert list(as_hugging_face({name: numbers(2)})) == [name]


@pytest.mark.parametrize("name", ["mlp_block.ffw_up.w", "mlp_block.ffw_up.b", "recurrent_block.conv_1d.w"])
def test_misshapen(name: str) -> None:
    with pytest.raises(WeightsError, match=rf"misshapen: blocks.0.{name} is \(6,\), expected"):
        as_hugging_face({f"blocks.0.{name}": numbers(6)})


def write_griffin(directory: Path, without: str = "") -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(griffin_model.config()))
    weights = {name: Tensor.from_float32(values) for name, values in griffin_model.weights().items() if name != without}
    write_safetensors(directory / "model.safetensors", weights, {})
    return directory


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="missing: layers.1.recurrent.recurrence_gate "):
        load_checkpoint(write_griffin(tmp_path / "griffin", "blocks.1.recurrent_block.rg_lru.a_gate.w"))


def test_a_quantised_copy_has_hugging_faces_names(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(write_griffin(tmp_path / "griffin"))
    quantize_checkpoint(checkpoint, tmp_path / "int8", Origin("int8", "griffin", "0"))
    stored = read_safetensors_directory(tmp_path / "int8").tensors
    assert "model.layers.0.temporal_block.rg_lru.input_gate_weight" in stored
    copied = load_checkpoint(tmp_path / "int8").weights
    assert copied["layers.0.recurrent.linear_x"].format.name == "INT8_G128"
    for name in ("layers.0.recurrent.conv", "layers.0.recurrent.input_gate_bias", "layers.2.attention.output_bias"):
        assert np.array_equal(copied[name].to_float32(), checkpoint.weights[name].to_float32())
