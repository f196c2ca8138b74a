"""Wrong models: each differs from the right one by one mistake that runtimes have made.

A mutant changes a spec and its weights, so any backend can run it. A tolerance counts only if every mutant fails it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from gemma2_fast.reference.softcap import softcap
from gemma2_fast.spec import AttentionSpec, ModelSpec
from gemma2_fast.weights.names import is_norm
from gemma2_fast.weights.tensor import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mutant:
    """`apply` returns the wrong model; one that equals the right one means that the mistake cannot be made there."""

    name: str
    apply: Callable[[ModelSpec, Weights], tuple[ModelSpec, Weights]]


def mutants_of(spec: ModelSpec, weights: Weights) -> list[tuple[str, ModelSpec, Weights]]:
    """(name, spec, weights) of every mutant that differs from this model."""
    found = []
    for mutant in MUTANTS:
        wrong_spec, wrong_weights = mutant.apply(spec, weights)
        if wrong_spec != spec or wrong_weights is not weights:
            found.append((mutant.name, wrong_spec, wrong_weights))
    return found


def _mixers(spec: ModelSpec, change: Callable[[int, AttentionSpec], AttentionSpec]) -> ModelSpec:
    layers = tuple(
        replace(layer, mixer=change(index, layer.mixer)) if isinstance(layer.mixer, AttentionSpec) else layer
        for index, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers)


def _window(step: int) -> Callable[[ModelSpec, Weights], tuple[ModelSpec, Weights]]:
    def apply(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
        def change(_: int, mixer: AttentionSpec) -> AttentionSpec:
            return mixer if mixer.window_keys is None else replace(mixer, window_keys=mixer.window_keys + step)

        return _mixers(spec, change), weights

    return apply


def _no_score_softcap(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    return _mixers(spec, lambda _, mixer: replace(mixer, score_softcap=None)), weights


def _no_final_softcap(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    return replace(spec, final_softcap=None), weights


def _shifted_pattern(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    """Every layer takes the next layer's attention: in an alternating stack, local and global trade places."""
    mixers = [layer.mixer for layer in spec.layers]
    shifted = [*mixers[1:], mixers[0]]
    layers = tuple(replace(layer, mixer=mixer) for layer, mixer in zip(spec.layers, shifted, strict=True))
    return replace(spec, layers=layers), weights


def _swapped_rope(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    """Windowed layers turn as the global ones do, and the other way round."""
    ropes = {
        layer.mixer.window_keys is None: layer.mixer.rope
        for layer in spec.layers
        if isinstance(layer.mixer, AttentionSpec)
    }
    if len(ropes) < 2:
        return spec, weights
    return _mixers(spec, lambda _, mixer: replace(mixer, rope=ropes[mixer.window_keys is not None])), weights


def _head_dim_scale(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    return _mixers(spec, lambda _, mixer: replace(mixer, query_scale=mixer.head_dim**-0.5)), weights


def _gain_without_one(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    """Norms multiply by w: storing w - 1 makes a right backend do just that."""
    lowered = {
        name: Tensor.from_float32(tensor.to_float32() - np.float32(1))
        for name, tensor in weights.items()
        if is_norm(name)
    }
    return spec, {**weights, **lowered}


def _wrong_kv_head(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    """Every query head reads the kv head after its own."""
    moved = {}
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer.mixer, AttentionSpec) or layer.mixer.num_kv_heads == 1:
            continue
        for role in ("key", "value"):
            name = f"layers.{index}.attention.{role}"
            rows = weights[name].to_float32()
            moved[name] = Tensor.from_float32(np.roll(rows, -layer.mixer.head_dim, axis=0))
    return (spec, {**weights, **moved}) if moved else (spec, weights)


def _gate_and_up_swapped(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    other = {".gate": ".up", ".up": ".gate"}
    swapped = {}
    for name in weights:
        stem, dot, role = name.rpartition(".")
        partner = other.get(dot + role)
        swapped[name] = weights[stem + partner] if partner and stem.endswith(".mlp") else weights[name]
    return spec, swapped


MUTANTS = (
    Mutant("window+1", _window(1)),
    Mutant("window-1", _window(-1)),
    Mutant("no score cap", _no_score_softcap),
    Mutant("no final cap", _no_final_softcap),
    Mutant("shifted layer pattern", _shifted_pattern),
    Mutant("local and global RoPE swapped", _swapped_rope),
    Mutant("query scale head_dim ** -0.5", _head_dim_scale),
    Mutant("w instead of 1 + w", _gain_without_one),
    Mutant("wrong kv head", _wrong_kv_head),
    Mutant("gate and up swapped", _gate_and_up_swapped),
)


def cap_after_mask(patch: pytest.MonkeyPatch) -> None:
    """The reference masks first, so that the cap turns minus infinity into -cap and hidden keys are seen a little."""

    def masked_then_capped(scores: torch.Tensor, cap: float | None, hidden: torch.Tensor) -> torch.Tensor:
        masked = scores.masked_fill(hidden, -torch.inf)
        return masked if cap is None else softcap(masked, cap)

    patch.setattr("gemma2_fast.reference.attention.capped_then_masked", masked_then_capped)


def exact_gelu(patch: pytest.MonkeyPatch) -> None:
    """The reference's GELU becomes the one with erf."""
    patch.setattr("gemma2_fast.reference.model.geglu", lambda gate, up: functional.gelu(gate) * up)


def interleaved_rope(patch: pytest.MonkeyPatch) -> None:
    """The reference turns neighbouring dims (2j, 2j + 1) instead of (j, j + R/2)."""

    def neighbours(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, b = x[..., 0::2], x[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    patch.setattr("gemma2_fast.reference.model.rope", neighbours)


REFERENCE_MUTANTS = {"cap after mask": cap_after_mask, "exact GELU": exact_gelu, "interleaved RoPE": interleaved_rope}
