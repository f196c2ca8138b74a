"""Checkpoints of both kinds become the same complete weights, or an error that lists what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_fast import Generator
from gemma2_fast.errors import ConfigError, FileFormatError, WeightsError
from gemma2_fast.quant import FORMATS
from gemma2_fast.spec import ModelSpec
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.names import hf_names, is_norm
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors
from tests.spec.configs import gemma1, gemma2, gemma3, recurrent_gemma
from tests.support.checkpoints import random_weights
from tests.support.gguf_writer import write_gguf

PROMPT = list(range(3, 90))
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {**gemma1(2, 256, 2, 1, 256), "head_dim": 128},
    "gemma2": {**gemma2(4, 256, 4, 2, 64, 256, 64), "attn_logit_softcapping": 7.0, "final_logit_softcapping": 11.0},
    "gemma3": gemma3(6, 256, 4, 1, 64, 256, 64, 40, 512),
}


def config_of(family: str) -> dict[str, Any]:
    return {**CONFIGS[family], "vocab_size": 512, "max_position_embeddings": 256, "sliding_window": 40}


def write_directory(path: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    names = hf_names(spec_from_config(config), ())
    write_safetensors(path / "model.safetensors", {names.get(n, n): t for n, t in weights.items()}, {})
    return path


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, Any], ModelSpec, dict[str, Tensor]]:
    config = config_of("gemma2")
    spec = spec_from_config(config)
    weights = random_weights(spec, "F32")
    return tmp_path / "model", config, spec, weights


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("format_name", ["F32", "Q8_0", "Q4_K"])
def test_a_gguf_file_gives_the_same_logits_as_its_source(family: str, format_name: str, tmp_path: Path) -> None:
    """Caps that are nobody's default survive, norms lose their 1, and the scale and the pattern are supplied."""
    config = config_of(family)
    spec = spec_from_config(config)
    weights = random_weights(spec, format_name)
    plain = weights if format_name == "F32" else {n: Tensor.from_float32(t.to_float32()) for n, t in weights.items()}
    directory = write_directory(tmp_path / "hf", config, plain)
    write_gguf(tmp_path / "model.gguf", family, spec, weights)
    with Generator.from_pretrained(directory) as gen:
        expected = gen.logits(PROMPT)
    with Generator.from_pretrained(tmp_path / "model.gguf", activations="float32") as gen:
        assert gen.plan.spec.layers == spec.layers
        assert gen.plan.spec.final_softcap == spec.final_softcap
        got = gen.logits(PROMPT)
    assert np.abs(got - expected).max() < 2e-5 * np.abs(expected).max()


def test_norms_keep_their_stored_value(tmp_path: Path) -> None:
    spec = spec_from_config(config_of("gemma3"))
    weights = random_weights(spec, "F32")
    write_gguf(tmp_path / "model.gguf", "gemma3", spec, weights)
    loaded = load_checkpoint(tmp_path / "model.gguf")
    for name in filter(is_norm, weights):
        np.testing.assert_allclose(loaded.weights[name].to_float32(), weights[name].to_float32(), atol=2e-6)
    assert loaded.eos_ids == (1,)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", ""])
def test_multimodal_prefixes(model: Any, prefix: str) -> None:
    path, config, spec, weights = model
    write_directory(path, config, weights)
    names = hf_names(spec, ())
    moved = {prefix + names[n].removeprefix("model."): t for n, t in weights.items()}
    moved["vision_tower.patch.weight"] = moved["multi_modal_projector.norm.weight"] = weights["final_norm"]
    write_safetensors(path / "model.safetensors", moved, {})
    assert set(load_checkpoint(path).weights) == set(manifest(spec))


def test_an_output_matrix_must_be_the_embedding(model: Any) -> None:
    path, config, _, weights = model
    write_directory(path, config, {**weights, "lm_head.weight": weights["embedding"]})
    assert "lm_head.weight" not in load_checkpoint(path).weights
    other = Tensor.from_float32(weights["embedding"].to_float32() + 1)
    write_directory(path, config, {**weights, "lm_head.weight": other})
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs"):
        load_checkpoint(path)


def test_every_fault_is_listed_at_once(model: Any) -> None:
    path, config, _, weights = model
    wrong = dict(weights)
    del wrong["layers.1.mlp.up"], wrong["final_norm"]
    wrong["model.layers.9.extra.weight"] = weights["final_norm"]
    wrong["layers.0.attention.query"] = weights["layers.0.attention.key"]
    write_directory(path, config, wrong)
    with pytest.raises(WeightsError) as caught:
        load_checkpoint(path)
    text = str(caught.value)
    for part in (
        "missing: layers.1.mlp.up (256, 256)",
        "missing: final_norm (256,)",
        "unexpected: model.layers.9.extra.weight",
        "misshapen: layers.0.attention.query is (128, 256), expected (256, 256)",
    ):
        assert part in text
    assert text.startswith(f"{path}: 4 tensors")


def test_a_config_of_another_family(model: Any) -> None:
    path, config, _, weights = model
    write_directory(path, config, weights)
    (path / "config.json").write_text(json.dumps(config_of("gemma3")))
    with pytest.raises(WeightsError, match="missing: layers.0.attention.query_norm"):
        load_checkpoint(path)
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match="llama"):
        load_checkpoint(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(FileFormatError, match="object"):
        load_checkpoint(path)


RECURRENT = {**recurrent_gemma(3, 64, 2), "head_dim": 32, "vocab_size": 64}


def test_recurrent_gemma_loads(tmp_path: Path) -> None:
    spec = spec_from_config(RECURRENT)
    directory = write_directory(tmp_path / "rg", RECURRENT, random_weights(spec, "F32"))
    assert {n: t.shape for n, t in load_checkpoint(directory).weights.items()} == manifest(spec)


@pytest.mark.parametrize(
    "gone",
    [
        "layers.0.recurrent.input_gate",
        "layers.1.recurrent.recurrence_gate_bias",
        "layers.0.recurrent.linear_x_bias",
        "layers.1.recurrent.decay",
        "layers.2.attention.output_bias",
        "layers.2.mlp.down_bias",
    ],
)
def test_recurrent_gemma_without_a_tensor(gone: str, tmp_path: Path) -> None:
    weights = random_weights(spec_from_config(RECURRENT), "F32")
    del weights[gone]
    with pytest.raises(WeightsError, match=f"missing: {gone} "):
        load_checkpoint(write_directory(tmp_path / "rg", RECURRENT, weights))


@pytest.mark.parametrize(
    ("stated", "expected"), [(1, (1,)), ([1, 107], (1, 107)), (None, (5,)), ([1, 1], (1,))], ids=str
)
def test_eos_ids_may_be_one_or_many(model: Any, stated: Any, expected: tuple[int, ...]) -> None:
    path, config, _, weights = model
    write_directory(path, {**config, "eos_token_id": 5}, weights)
    assert load_checkpoint(path).eos_ids == (5,)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stated}))
    assert load_checkpoint(path).eos_ids == expected


def test_sampling_defaults_come_from_generation_config(model: Any) -> None:
    path, config, _, weights = model
    write_directory(path, config, weights)
    with Generator.from_pretrained(path) as gen:
        greedy = gen.generate(PROMPT, max_tokens=12)
        assert greedy.token_ids == gen.generate(PROMPT, max_tokens=12, seed=3).token_ids
    sampled = {"do_sample": True, "top_k": 64, "top_p": 0.95, "max_new_tokens": 7, "eos_token_id": [1, 106]}
    (path / "generation_config.json").write_text(json.dumps(sampled))
    with Generator.from_pretrained(path) as gen:
        first = gen.generate(PROMPT, seed=3)
        assert len(first.token_ids) == 7
        assert first.token_ids != gen.generate(PROMPT, seed=4).token_ids
        assert gen.generate(PROMPT, temperature=0, max_tokens=12).token_ids == greedy.token_ids


def test_bad_eos_id(model: Any) -> None:
    path, config, _, weights = model
    write_directory(path, {**config, "eos_token_id": "1"}, weights)
    with pytest.raises(ConfigError, match="eos_token_id"):
        load_checkpoint(path)


def test_bfloat16_and_half_precision_checkpoints(model: Any) -> None:
    path, config, _, weights = model
    rounded = {}
    for name, tensor in weights.items():
        pack = FORMATS["BF16"].pack
        assert pack is not None
        blocks = pack(tensor.to_float32().reshape(-1, 1))
        rounded[name] = Tensor(tensor.shape, FORMATS["BF16"], np.ascontiguousarray(blocks).reshape(-1))
    write_directory(path, config, weights)
    with Generator.from_pretrained(path, dtype="bfloat16", kv_dtype="float32") as gen:
        converted = gen.logits(PROMPT)
    write_directory(path, config, {n: rounded[n] if len(t.shape) > 1 else t for n, t in weights.items()})
    with Generator.from_pretrained(path, kv_dtype="float32") as gen:
        assert gen.plan.cache.kv_dtype == "float32"
        assert np.array_equal(gen.logits(PROMPT), converted)
    with Generator.from_pretrained(path) as gen:
        assert gen.plan.cache.kv_dtype == "bfloat16"


def test_paths_that_are_nearly_right(model: Any) -> None:
    path, config, spec, weights = model
    write_directory(path, config, weights)
    with pytest.raises(FileFormatError, match=r"give the directory with config\.json"):
        load_checkpoint(path / "model.safetensors")
    (path / "config.json").unlink()
    write_gguf(path / "model.gguf", "gemma2", spec, weights)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*model\.gguf"):
        load_checkpoint(path)


def test_foreign_eos_id(model: Any) -> None:
    path, config, _, weights = model
    write_directory(path, {**config, "eos_token_id": 107000}, weights)
    with pytest.raises(ConfigError, match="107000"):
        load_checkpoint(path)


def test_a_bad_generation_config_is_named_at_load(model: Any) -> None:
    path, config, _, weights = model
    write_directory(path, config, weights)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": "hot"}))
    with pytest.raises(ConfigError, match=r"generation_config\.json.*temperature"):
        Generator.from_pretrained(path)
