"""The parts of a layer. Pure data: numbers and nothing of files, devices or arrays."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, fields

from gemma2_fast.errors import ConfigError


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{type(owner).__name__}.{name} must be a positive finite number, got {value!r}")


def _whole(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ConfigError(f"{type(owner).__name__}.{name} must be a whole number, got {value!r}")


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the first `rotated_dims` of a head, halves convention.

    Pair j turns by position * position_scale * base ** (-2 j / rotated_dims).
    """

    base: float
    rotated_dims: int
    position_scale: float

    def __post_init__(self) -> None:
        _positive(self, "base", "rotated_dims", "position_scale")
        _whole(self, "rotated_dims")
        if self.rotated_dims % 2:
            raise ConfigError(f"RopeSpec.rotated_dims must be even, got {self.rotated_dims}")

    def inverse_frequencies(self) -> tuple[float, ...]:
        """Float32 values [rotated_dims / 2]; a token's angles are their float32 products with its position.

        Official code computes these tables in float32 whatever the model's dtype, so every backend shares them.
        """
        exact = (self.base ** (-2 * j / self.rotated_dims) * self.position_scale for j in range(self.rotated_dims // 2))
        return tuple(struct.unpack("f", struct.pack("f", value))[0] for value in exact)


@dataclass(frozen=True)
class AttentionSpec:
    """Grouped-query attention. `window_keys` counts keys with the query included; None sees every earlier key."""

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    query_scale: float
    score_softcap: float | None
    window_keys: int | None
    qk_norm: bool
    output_bias: bool
    rope: RopeSpec

    def __post_init__(self) -> None:
        _positive(self, "num_query_heads", "num_kv_heads", "head_dim", "query_scale", "score_softcap", "window_keys")
        _whole(self, "num_query_heads", "num_kv_heads", "head_dim", "window_keys")
        if self.num_query_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_query_heads ({self.num_query_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})"
            )
        if self.rope.rotated_dims > self.head_dim:
            raise ConfigError(f"rotated_dims ({self.rope.rotated_dims}) exceed head_dim ({self.head_dim})")

    @property
    def group_heads(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_query_heads // self.num_kv_heads


@dataclass(frozen=True)
class RecurrentSpec:
    """RG-LRU with a short causal convolution; `num_gate_blocks` diagonal blocks of the two gate matrices."""

    width: int
    num_gate_blocks: int
    conv_width: int

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        _positive(self, *names)
        _whole(self, *names)
        if self.width % self.num_gate_blocks:
            raise ConfigError(
                f"recurrent width ({self.width}) must be a multiple of num_gate_blocks ({self.num_gate_blocks})"
            )


@dataclass(frozen=True)
class MlpSpec:
    """Gated MLP: down(gelu_tanh(gate(x)) * up(x)); `width` is that of one branch."""

    width: int
    bias: bool

    def __post_init__(self) -> None:
        _positive(self, "width")
        _whole(self, "width")


@dataclass(frozen=True)
class NormPlacement:
    """Which RMSNorms a layer has besides those before the mixer and before the MLP."""

    after_mixer: bool
    after_mlp: bool


@dataclass(frozen=True)
class LayerSpec:
    mixer: AttentionSpec | RecurrentSpec
    mlp: MlpSpec
    norms: NormPlacement
