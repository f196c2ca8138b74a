"""A whole model as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gemma2_fast.errors import ConfigError
from gemma2_fast.spec.layers import AttentionSpec, LayerSpec, _positive, _whole


@dataclass(frozen=True)
class ModelSpec:
    """A decoder: embedding * embedding_scale, layers, final RMSNorm, tied output matrix, optional soft cap.

    model_width E, vocab_size V. `assumed` names the values that the source did not state and a table supplied.
    """

    family: str
    layers: tuple[LayerSpec, ...]
    model_width: int
    vocab_size: int
    max_positions: int
    embedding_scale: float
    norm_epsilon: float
    final_softcap: float | None
    assumed: tuple[str, ...]

    def __post_init__(self) -> None:
        _positive(
            self,
            "model_width",
            "vocab_size",
            "max_positions",
            "embedding_scale",
            "norm_epsilon",
            "final_softcap",
        )
        _whole(self, "model_width", "vocab_size", "max_positions")
        if not self.layers:
            raise ConfigError("a model needs at least one layer")

    @property
    def has_bounded_cache(self) -> bool:
        """Whether every layer sees a window or keeps a state, so that the cache does not grow with the text."""
        mixers = [layer.mixer for layer in self.layers]
        return not any(isinstance(mixer, AttentionSpec) and mixer.window_keys is None for mixer in mixers)

    def with_window(self, window_keys: int | None) -> ModelSpec:
        """The same model with another window on its windowed layers; None keeps the trained one."""
        if window_keys is None:
            return self
        if not any(isinstance(layer.mixer, AttentionSpec) and layer.mixer.window_keys for layer in self.layers):
            raise ConfigError(f"sliding_window={window_keys} was given, but no layer of {self.family} has a window")
        layers = tuple(
            replace(layer, mixer=replace(layer.mixer, window_keys=window_keys))
            if isinstance(layer.mixer, AttentionSpec) and layer.mixer.window_keys is not None
            else layer
            for layer in self.layers
        )
        return replace(self, layers=layers)
