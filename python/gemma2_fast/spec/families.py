"""Reads a model's config.json, or the metadata of a GGUF file, into a ModelSpec.

Families differ in the data built here and nowhere else. A key that a source leaves out is an error that names it, but
for the values in the tables below, which the source's format never states; `ModelSpec.assumed` lists those taken.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from gemma2_fast.errors import ConfigError
from gemma2_fast.spec.layers import AttentionSpec, LayerSpec, MlpSpec, NormPlacement, RecurrentSpec, RopeSpec
from gemma2_fast.spec.model import ModelSpec

Config = Mapping[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"

MAX_LAYERS = 1024
SMALLEST, LARGEST = 1e-30, 1e30  # beyond any use, and neither zero nor infinite as a float32

# Gemma 3's multimodal files leave these out of text_config (the class defaults of transformers' Gemma3TextConfig).
GEMMA3_TEXT_DEFAULTS: Config = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}

# What llama.cpp's converter never writes, per architecture.
GGUF_DEFAULTS: Mapping[str, Config] = {
    "gemma": {"rope_theta": 10_000.0},
    "gemma2": {
        "rope_theta": 10_000.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
    },
    "gemma3": {
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}

# Models whose query scale is (width / heads) ** -0.5 rather than head_dim ** -0.5, by architecture and layer count.
GGUF_WIDTH_SCALED_LAYERS = {("gemma2", 46), ("gemma3", 62)}

GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}


def spec_from_config(config: Config) -> ModelSpec:
    """The model a config.json describes, in old and new spellings. ConfigError names the key at fault."""
    model_type = config.get("model_type")
    if model_type == "gemma3" and isinstance(config.get("text_config"), Mapping):
        text = config["text_config"]
        missing = {key: value for key, value in GEMMA3_TEXT_DEFAULTS.items() if key not in text}
        if "rope_parameters" in text:
            missing = {key: value for key, value in missing.items() if not key.startswith("rope_")}
        if "layer_types" in text or "_sliding_window_pattern" in text:
            missing.pop("sliding_window_pattern", None)
        assumed = tuple(f"{key}={value}" for key, value in missing.items() if value is not None)
        return _gemma3({**text, **missing}, assumed)
    builder = _BUILDERS.get(str(model_type))
    if builder is None:
        raise ConfigError(f"config.json: model_type {model_type!r} is not supported; known: {', '.join(_BUILDERS)}")
    return builder(config, ())


def spec_from_gguf(metadata: Mapping[str, Any], vocab_size: int) -> ModelSpec:
    """The model a GGUF file's metadata describes; `vocab_size` is the number of rows of its embedding."""
    architecture = str(metadata.get("general.architecture"))
    if architecture not in GGUF_DEFAULTS:
        known = ", ".join(GGUF_DEFAULTS)
        raise ConfigError(f"GGUF: general.architecture {architecture!r} is not supported; known: {known}")
    stated = {
        name: metadata[f"{architecture}.{key}"]
        for name, key in GGUF_KEYS.items()
        if f"{architecture}.{key}" in metadata
    }
    for name, value in stated.items():
        if not isinstance(value, int | float):
            raise ConfigError(f"GGUF: {architecture}.{GGUF_KEYS[name]} must be a number, got {type(value).__name__}")
    head_dim, value_dim = (metadata.get(f"{architecture}.attention.{key}_length") for key in ("key", "value"))
    if value_dim is not None and value_dim != head_dim:
        raise ConfigError(f"GGUF: attention.value_length ({value_dim}) differs from attention.key_length ({head_dim})")
    supplied = {name: value for name, value in GGUF_DEFAULTS[architecture].items() if name not in stated}
    config: dict[str, Any] = {**stated, **supplied, "vocab_size": vocab_size, "hidden_act": "gelu_pytorch_tanh"}

    scaling = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if not isinstance(scaling, str) or scaling not in ("none", "linear"):
        raise ConfigError(f"GGUF: {architecture}.rope.scaling.type {scaling!r} is not supported; known: none, linear")
    if scaling == "linear":
        factor_key = f"{architecture}.rope.scaling.factor"
        if factor_key not in metadata:
            raise ConfigError(f"GGUF: {factor_key} is missing, though {architecture}.rope.scaling.type is linear")
        config["rope_scaling"] = {"rope_type": "linear", "factor": metadata[factor_key]}
    if architecture != "gemma":
        if (architecture, _num_layers(config)) in GGUF_WIDTH_SCALED_LAYERS:
            supplied["query_pre_attn_scalar"] = _count(config, "hidden_size") / _count(config, "num_attention_heads")
        else:
            supplied["query_pre_attn_scalar"] = _count(config, "head_dim")
        config["query_pre_attn_scalar"] = supplied["query_pre_attn_scalar"]
    assumed = tuple(f"{name}={value:g}" for name, value in supplied.items() if value is not None)
    return _BUILDERS[architecture](config, assumed)


def _gemma(config: Config, assumed: tuple[str, ...]) -> ModelSpec:
    rope = _rope(config, config.get("rope_parameters"), "rope_theta")
    head_dim = _count(config, "head_dim")
    layer = _layer(config, rope, head_dim**-0.5, None, None, qk_norm=False, post_norms=False)
    return _model("gemma", config, (layer,) * _num_layers(config), None, assumed)


def _gemma2(config: Config, assumed: tuple[str, ...]) -> ModelSpec:
    rope = _rope(config, config.get("rope_parameters"), "rope_theta")
    scale = _number(config, "query_pre_attn_scalar") ** -0.5
    cap = _optional_number(config, "attn_logit_softcapping")
    layers = tuple(
        _layer(config, rope, scale, cap, _window(config) if kind == SLIDING else None, qk_norm=False, post_norms=True)
        for kind in _layer_kinds(config, period=2)
    )
    return _model("gemma2", config, layers, _optional_number(config, "final_logit_softcapping"), assumed)


def _gemma3(config: Config, assumed: tuple[str, ...]) -> ModelSpec:
    parameters = config.get("rope_parameters")
    if parameters is not None:
        keys = {SLIDING: "rope_local_base_freq", FULL: "rope_theta"}
        for kind in keys:
            if not isinstance(parameters, Mapping) or not isinstance(parameters.get(kind), Mapping):
                raise ConfigError(f"config.json: rope_parameters has no entry {kind!r}")
        ropes = {kind: _rope(config, parameters[kind], key) for kind, key in keys.items()}
    else:
        local = {"rope_theta": _number(config, "rope_local_base_freq")}
        ropes = {SLIDING: _rope(config, local, None), FULL: _rope(config, None, "rope_theta")}
    scale = _number(config, "query_pre_attn_scalar") ** -0.5
    cap = _optional_number(config, "attn_logit_softcapping")
    if config.get("use_bidirectional_attention"):
        raise ConfigError("config.json: use_bidirectional_attention is true, but only causal models are supported")

    spellings = [key for key in ("sliding_window_pattern", "_sliding_window_pattern") if key in config]
    periods = {
        _count(config, key)
        for key in spellings or ["sliding_window_pattern"]
        if spellings or "layer_types" not in config
    }
    if len(periods) > 1:
        raise ConfigError(f"config.json: {' and '.join(spellings)} contradict each other: {sorted(periods)}")
    period = next(iter(periods), None)
    kinds = _layer_kinds(config, period)
    if period is not None and kinds != _every(period, len(kinds)):
        raise ConfigError(f"config.json: layer_types contradicts {spellings[0]} ({period})")
    layers = tuple(
        _layer(
            config, ropes[kind], scale, cap, _window(config) if kind == SLIDING else None, qk_norm=True, post_norms=True
        )
        for kind in kinds
    )
    return _model("gemma3", config, layers, _optional_number(config, "final_logit_softcapping"), assumed)


def _recurrent_gemma(config: Config, assumed: tuple[str, ...]) -> ModelSpec:
    _check_activation(config, exact_allowed=False)
    if config.get("embeddings_scale_by_sqrt_dim") is False:
        raise ConfigError("config.json: embeddings_scale_by_sqrt_dim is false, but every RecurrentGemma scales by it")
    heads, head_dim = _count(config, "num_attention_heads"), _count(config, "head_dim")
    parameters = config.get("rope_parameters")
    newer = parameters if isinstance(parameters, Mapping) else {}
    rope = _rope(config, parameters, "rope_theta", rotated=_number({**config, **newer}, "partial_rotary_factor"))
    mlp_width = _count(config, "intermediate_size")
    if mlp_width % 2:
        raise ConfigError(f"config.json: intermediate_size counts both branches and must be even, got {mlp_width}")
    attention = AttentionSpec(
        num_query_heads=heads,
        num_kv_heads=_count(config, "num_key_value_heads"),
        head_dim=head_dim,
        query_scale=head_dim**-0.5,
        score_softcap=None,
        # The reference lets a query see this many earlier keys besides its own.
        window_keys=_count(config, "attention_window_size") + 1,
        qk_norm=False,
        output_bias=True,
        rope=rope,
    )
    lru_width = _width(config) if config.get("lru_width", 0) is None else _count(config, "lru_width")
    recurrent = RecurrentSpec(lru_width, heads, _count(config, "conv1d_width"))
    mixers: dict[str, AttentionSpec | RecurrentSpec] = {"recurrent": recurrent, "attention": attention}
    key = "block_types" if "block_types" in config else "_block_types"
    pattern = config.get(key)
    if not isinstance(pattern, list) or not pattern or any(str(kind) not in mixers for kind in pattern):
        raise ConfigError(f"config.json: {key} must be a list of 'recurrent' and 'attention', got {pattern!r}")
    norms = NormPlacement(after_mixer=False, after_mlp=False)
    layers = tuple(
        LayerSpec(mixers[pattern[index % len(pattern)]], MlpSpec(mlp_width // 2, bias=True), norms)
        for index in range(_num_layers(config))
    )
    spec_config = {"max_position_embeddings": 8192, **config}
    if "max_position_embeddings" not in config:
        assumed = (*assumed, "max_position_embeddings=8192")
    cap = _optional_number(config, "logits_soft_cap")
    return _model("recurrent_gemma", spec_config, layers, cap, assumed, scale=_bfloat16(math.sqrt(_width(config))))


_BUILDERS: dict[str, Callable[[Config, tuple[str, ...]], ModelSpec]] = {
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gemma3_text": _gemma3,
    "recurrent_gemma": _recurrent_gemma,
}


def _model(
    family: str,
    config: Config,
    layers: tuple[LayerSpec, ...],
    final_softcap: float | None,
    assumed: tuple[str, ...],
    scale: float | None = None,
) -> ModelSpec:
    if config.get("tie_word_embeddings", True) is not True:
        raise ConfigError("config.json: tie_word_embeddings is false, but every Gemma ties its output to its embedding")
    return ModelSpec(
        family=family,
        layers=layers,
        model_width=_width(config),
        vocab_size=_count(config, "vocab_size"),
        max_positions=_count(config, "max_position_embeddings"),
        embedding_scale=math.sqrt(_width(config)) if scale is None else scale,
        norm_epsilon=_number(config, "rms_norm_eps"),
        final_softcap=final_softcap,
        assumed=assumed,
    )


def _layer(
    config: Config,
    rope: RopeSpec,
    query_scale: float,
    score_softcap: float | None,
    window_keys: int | None,
    *,
    qk_norm: bool,
    post_norms: bool,
) -> LayerSpec:
    # Early Gemma 1 files name the exact GELU or nothing; the model was trained with the tanh form.
    _check_activation(config, exact_allowed=not post_norms)
    heads, kv_heads = _count(config, "num_attention_heads"), _count(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({kv_heads})"
        )
    attention = AttentionSpec(
        num_query_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_count(config, "head_dim"),
        query_scale=query_scale,
        score_softcap=score_softcap,
        window_keys=window_keys,
        qk_norm=qk_norm,
        output_bias=False,
        rope=rope,
    )
    mlp = MlpSpec(_count(config, "intermediate_size"), bias=False)
    return LayerSpec(attention, mlp, NormPlacement(after_mixer=post_norms, after_mlp=post_norms))


def _check_activation(config: Config, *, exact_allowed: bool) -> None:
    """The tanh form of GELU everywhere, and no biases on queries, keys and values."""
    if config.get("attention_bias"):
        raise ConfigError("config.json: attention_bias is true, but Gemma's queries, keys and values have no biases")
    for key in ("hidden_activation", "hidden_act"):
        activation = config.get(key)
        if activation in (None, "gelu_pytorch_tanh") or (exact_allowed and activation == "gelu"):
            continue
        raise ConfigError(f"config.json: {key} must be 'gelu_pytorch_tanh', got {activation!r}")


def _layer_kinds(config: Config, period: int | None) -> list[str]:
    """Sliding or full for every layer: stated, or every `period`-th layer full."""
    num_layers = _num_layers(config)
    kinds = config.get("layer_types")
    if kinds is None:
        if period is None:
            raise ConfigError("config.json: layer_types is null and sliding_window_pattern is missing")
        return _every(period, num_layers)
    if not isinstance(kinds, list) or any(kind not in (SLIDING, FULL) for kind in kinds):
        raise ConfigError(f"config.json: layer_types must be a list of {SLIDING!r} and {FULL!r}, got {kinds!r}")
    if len(kinds) != num_layers:
        raise ConfigError(f"config.json: layer_types names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    return kinds


def _every(period: int, num_layers: int) -> list[str]:
    return [FULL if (index + 1) % period == 0 else SLIDING for index in range(num_layers)]


def _num_layers(config: Config) -> int:
    count = _count(config, "num_hidden_layers")
    if count > MAX_LAYERS:
        raise ConfigError(f"num_hidden_layers must be at most {MAX_LAYERS}, got {count}")
    return count


def _rope(config: Config, parameters: Any, theta_key: str | None, rotated: float = 1.0) -> RopeSpec:
    """A RopeSpec from `rope_parameters` (new spelling) or from `theta_key` and `rope_scaling` (old)."""
    head_dim = _count(config, "head_dim")
    if parameters is None:
        if theta_key is None:
            raise ConfigError("config.json: rope_parameters is null")
        theta, scaling = _number(config, theta_key), config.get("rope_scaling") or {}
    else:
        if not isinstance(parameters, Mapping):
            raise ConfigError(f"config.json: rope_parameters must be an object, got {parameters!r}")
        theta, scaling = _number(parameters, "rope_theta"), parameters
        if theta_key and config.get(theta_key, theta) != theta:
            raise ConfigError(
                f"config.json: {theta_key} ({config[theta_key]}) contradicts rope_parameters.rope_theta ({theta})"
            )
        older = config.get("rope_scaling")
        if theta_key == "rope_theta" and isinstance(older, Mapping) and older.get("factor") != parameters.get("factor"):
            raise ConfigError(f"config.json: rope_scaling ({older}) contradicts rope_parameters ({dict(parameters)})")
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"config.json: rope_scaling must be an object or null, got {scaling!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise ConfigError(f"config.json: rope_type {kind!r} is not supported; known: default, linear")
    position_scale = 1 / _number(scaling, "factor") if kind == "linear" else 1.0
    return RopeSpec(theta, int(head_dim * rotated), position_scale)


def _window(config: Config) -> int:
    return _count(config, "sliding_window")


def _width(config: Config) -> int:
    return _count(config, "hidden_size")


def _number(config: Config, key: str) -> float:
    """A positive finite number that must be there."""
    if key not in config:
        raise ConfigError(f"the configuration has no {key}")
    value = config[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST <= value <= LARGEST:
        raise ConfigError(f"{key} must be a positive finite number, got {value!r:.100}")
    return float(value)


def _optional_number(config: Config, key: str) -> float | None:
    """As `_number`, but the key may be null (and must still be there: silence is not consent)."""
    return None if key in config and config[key] is None else _number(config, key)


def _count(config: Config, key: str) -> int:
    value = _number(config, key)
    if value != int(value) or value >= 2**31:
        raise ConfigError(f"{key} must be a whole number below 2^31, got {config[key]!r}")
    return int(value)


def _bfloat16(value: float) -> float:
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    result: float = struct.unpack("<f", struct.pack("<I", rounded))[0]
    return result
