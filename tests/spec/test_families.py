"""What config.json and GGUF metadata say, read into a ModelSpec."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gemma2_fast.errors import ConfigError
from gemma2_fast.spec import AttentionSpec, ModelSpec, RecurrentSpec
from gemma2_fast.spec.families import spec_from_config, spec_from_gguf
from gemma2_fast.weights.manifest import manifest
from tests.spec.configs import RELEASED, gemma1, gemma2, gemma3

DATA = Path(__file__).parents[1] / "data"


def attention(spec: ModelSpec, layer: int) -> AttentionSpec:
    mixer = spec.layers[layer].mixer
    assert isinstance(mixer, AttentionSpec)
    return mixer


def test_the_published_config_of_gemma_2_2b_it() -> None:
    spec = spec_from_config(json.loads((DATA / "gemma-2-2b-it_config.json").read_bytes()))
    assert (spec.model_width, spec.vocab_size, spec.embedding_scale, spec.final_softcap) == (2304, 256000, 48.0, 30.0)
    local, all_keys = attention(spec, 0), attention(spec, 1)
    assert (local.window_keys, all_keys.window_keys) == (4096, None)
    assert (local.query_scale, local.score_softcap, local.rope.base) == (1 / 16, 50.0, 10000.0)
    assert spec.assumed == ()


@pytest.mark.parametrize("name", RELEASED)
def test_manifest_has_the_published_parameter_and_tensor_counts(name: str) -> None:
    config, parameters, tensors = RELEASED[name]
    shapes = manifest(spec_from_config(config))
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert len(shapes) == tensors


def test_windowed_layers() -> None:
    two, three = spec_from_config(RELEASED["gemma-2-2b"][0]), spec_from_config(RELEASED["gemma-3-270m"][0])
    assert [i for i in range(26) if attention(two, i).window_keys is None] == list(range(1, 26, 2))
    assert [i for i in range(18) if attention(three, i).window_keys is None] == [5, 11, 17]
    one = spec_from_config(RELEASED["gemma-2b"][0])
    assert all(attention(one, i).window_keys is None for i in range(18))


def test_query_scale_is_not_always_that_of_the_head() -> None:
    assert attention(spec_from_config(RELEASED["gemma-2-27b"][0]), 0).query_scale == 144**-0.5
    assert attention(spec_from_config(RELEASED["gemma-3-27b"][0]), 0).query_scale == 168**-0.5
    assert attention(spec_from_config(RELEASED["gemma-7b"][0]), 0).query_scale == 1 / 16


def test_gemma_3_ropes() -> None:
    spec = spec_from_config(RELEASED["gemma-3-4b"][0])
    local, all_keys = attention(spec, 0).rope, attention(spec, 5).rope
    assert (local.base, local.position_scale) == (1e4, 1.0)
    assert (all_keys.base, all_keys.position_scale) == (1e6, 1 / 8)
    assert all_keys.inverse_frequencies()[0] == 0.125


def test_recurrent_gemma() -> None:
    spec = spec_from_config(RELEASED["recurrentgemma-2b"][0])
    kinds = ["A" if isinstance(layer.mixer, AttentionSpec) else "R" for layer in spec.layers]
    assert "".join(kinds) == "RRA" * 8 + "RR"
    assert isinstance(spec.layers[0].mixer, RecurrentSpec)
    assert attention(spec, 2).window_keys == 2049  # 2048 earlier keys and its own
    assert attention(spec, 2).rope.rotated_dims == 128
    assert spec.embedding_scale == 50.5  # sqrt(2560) in bfloat16, whatever the dtype
    assert spec.layers[0].mlp.width == 7680


def test_recurrent_gemma_of_newer_files() -> None:
    old = RELEASED["recurrentgemma-2b"][0]
    gone = {"rope_theta", "partial_rotary_factor", "_block_types"}
    new = {key: value for key, value in old.items() if key not in gone} | {
        "block_types": old["_block_types"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "lru_width": None,  # that of the model
    }
    assert spec_from_config(new) == spec_from_config(old)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_block_types": ["recurrent", "mamba"]}, "_block_types"),
        ({"_block_types": []}, "_block_types"),
        ({"_block_types": None}, "_block_types"),
        ({"hidden_activation": "gelu"}, "hidden_activation"),
        ({"attention_bias": True}, "attention_bias"),
        ({"embeddings_scale_by_sqrt_dim": False}, "embeddings_scale_by_sqrt_dim"),
        ({"intermediate_size": 15361}, "intermediate_size"),
        ({"lru_width": 2561}, "num_gate_blocks"),
        ({"partial_rotary_factor": 1.5}, "rotated_dims"),
        ({"conv1d_width": 0}, "conv1d_width"),
    ],
)
def test_a_recurrent_gemma_that_is_none(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        spec_from_config({**RELEASED["recurrentgemma-2b"][0], **change})


def test_which_models_have_a_bounded_cache() -> None:
    bounded = {name for name, (config, _, _) in RELEASED.items() if spec_from_config(config).has_bounded_cache}
    assert bounded == {"recurrentgemma-2b", "recurrentgemma-9b"}


def test_new_spellings_give_the_same_model() -> None:
    old = gemma3(34, 2560, 8, 4, 256, 10240, 256, 1024, 262208)
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    del new["sliding_window_pattern"]
    new["layer_types"] = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(34)]
    new["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    }
    assert spec_from_config(new) == spec_from_config(old)

    old = gemma2(4, 64, 4, 2, 16, 128, 16)
    new = {key: value for key, value in old.items() if key != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    new["layer_types"] = ["sliding_attention", "full_attention"] * 2
    assert spec_from_config(new) == spec_from_config(old)


def test_a_multimodal_config_leaves_keys_out() -> None:
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    text["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}  # type: ignore[assignment]
    spec = spec_from_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    full = spec_from_config(RELEASED["gemma-3-4b"][0])
    assert spec.layers == full.layers
    assert "num_attention_heads=8" in spec.assumed


BAD: list[tuple[dict[str, Any], str]] = [
    ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping"),
    ({"attn_logit_softcapping": -5.0}, "attn_logit_softcapping"),
    ({"attn_logit_softcapping": float("nan")}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": float("inf")}, "final_logit_softcapping"),
    ({"sliding_window": 0}, "sliding_window"),
    ({"sliding_window": None}, "sliding_window"),
    ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ({"num_attention_heads": 0}, "num_attention_heads"),
    ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
    ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
    ({"head_dim": True}, "head_dim"),
    ({"head_dim": "256"}, "head_dim"),
    ({"head_dim": 15}, "rotated_dims"),
    ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
    ({"hidden_activation": "silu"}, "hidden_activation"),
    ({"attention_bias": True}, "attention_bias"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"layer_types": ["sliding_attention"]}, "layer_types"),
    ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}, "yarn"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, "contradicts"),
    ({"rope_parameters": [1]}, "rope_parameters"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
    ({"hidden_size": 10**400}, "hidden_size"),
    ({"attn_logit_softcapping": 1e-60}, "attn_logit_softcapping"),
    ({"model_type": "gemma3_text", "rope_parameters": [1]}, "rope_parameters"),
    ({"model_type": "llama"}, "llama"),
    ({"model_type": None}, "model_type"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_impossible_values_are_errors_that_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        spec_from_config({**gemma2(4, 64, 4, 2, 16, 128, 16), **change})


@pytest.mark.parametrize("key", sorted(set(gemma2(4, 64, 4, 2, 16, 128, 16)) - {"model_type", "hidden_activation"}))
def test_a_missing_key_is_an_error_that_names_it(key: str) -> None:
    config = gemma2(4, 64, 4, 2, 16, 128, 16)
    del config[key]
    with pytest.raises(ConfigError, match=key):
        spec_from_config(config)


def test_only_gemma_1_may_say_gelu() -> None:
    spec_from_config(gemma1(2, 64, 4, 1, 128))
    with pytest.raises(ConfigError, match="hidden_act"):
        spec_from_config({**gemma2(4, 64, 4, 2, 16, 128, 16), "hidden_act": "gelu"})


def gguf_metadata(architecture: str, layers: int, width: int, heads: int, **more: Any) -> dict[str, Any]:
    stated: dict[str, Any] = {
        "embedding_length": width,
        "feed_forward_length": 128,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": heads // 2,
        "attention.key_length": 128,
        "context_length": 8192,
        "attention.layer_norm_rms_epsilon": 1e-6,
        **more,
    }
    return {"general.architecture": architecture, **{f"{architecture}.{k}": v for k, v in stated.items()}}


def test_what_gguf_never_states_is_supplied_and_said() -> None:
    spec = spec_from_gguf(gguf_metadata("gemma2", 46, 4608, 32), 256000)
    first = attention(spec, 0)
    assert (first.query_scale, first.score_softcap, first.window_keys) == (144**-0.5, 50.0, 4096)
    assert set(spec.assumed) >= {"query_pre_attn_scalar=144", "sliding_window=4096", "final_logit_softcapping=30"}
    assert attention(spec_from_gguf(gguf_metadata("gemma2", 26, 2304, 8), 256000), 0).query_scale == 128**-0.5


def test_odd_caps_in_gguf_survive() -> None:
    metadata = gguf_metadata("gemma2", 4, 64, 4, attn_logit_softcapping=7.0, final_logit_softcapping=11.0)
    spec = spec_from_gguf(metadata, 1000)
    assert (attention(spec, 0).score_softcap, spec.final_softcap) == (7.0, 11.0)


def test_gguf_gemma3_scaling() -> None:
    more = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 1024}
    spec = spec_from_gguf(gguf_metadata("gemma3", 62, 5376, 32, **more), 262144)
    assert attention(spec, 5).rope.position_scale == 1 / 8
    assert attention(spec, 0).rope == attention(spec, 1).rope
    assert attention(spec, 0).rope.base == 1e4
    assert attention(spec, 0).query_scale == 168**-0.5


def test_bad_gguf_metadata() -> None:
    with pytest.raises(ConfigError, match="llama"):
        spec_from_gguf({"general.architecture": "llama"}, 1000)
    with pytest.raises(ConfigError, match="sliding_window"):
        spec_from_gguf(gguf_metadata("gemma3", 6, 64, 4), 1000)
    with pytest.raises(ConfigError, match=r"rope\.scaling\.factor"):
        spec_from_gguf(gguf_metadata("gemma", 6, 64, 4, **{"rope.scaling.type": "linear"}), 1000)


def test_the_window_may_be_changed_and_nothing_else() -> None:
    spec = spec_from_config(gemma2(4, 64, 4, 2, 16, 128, 16)).with_window(100)
    assert [attention(spec, i).window_keys for i in range(4)] == [100, None, 100, None]
    with pytest.raises(ConfigError, match="no layer"):
        spec_from_config(gemma1(2, 64, 4, 1, 128)).with_window(100)


@pytest.mark.parametrize(
    "change",
    [
        {"sliding_window_pattern": 6, "_sliding_window_pattern": 2},
        {"rope_theta": 123.0},
        {"rope_local_base_freq": 77.0},
        {"layer_types": ["full_attention"] * 6},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
)
def test_gemma_3_spellings_that_contradict_each_other(change: dict[str, Any]) -> None:
    config = gemma3(6, 64, 4, 2, 16, 128, 16, 40, 512)
    config["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
    }
    spec_from_config(config)
    with pytest.raises(ConfigError, match="contradict"):
        spec_from_config({**config, **change})


@pytest.mark.parametrize(
    ("key", "value"),
    [("gemma2.block_count", [1, 2]), ("gemma2.rope.scaling.type", [1]), ("gemma2.attention.value_length", 64)],
)
def test_gguf_values_of_the_wrong_kind(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"block_count|scaling\.type|value_length"):
        spec_from_gguf({**gguf_metadata("gemma2", 4, 64, 4), key: value}, 1000)
