"""Wrong models: each differs from the right one by one mistake that runtimes have made.

A mutant changes a spec and its weights, so any backend can run it. A tolerance counts only if every mutant fails it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn import functional

from gemma2_fast.reference.rg_lru import rg_lru
from gemma2_fast.reference.softcap import softcap
from gemma2_fast.spec import AttentionSpec, ModelSpec
from gemma2_fast.weights.names import is_norm
from gemma2_fast.weights.tensor import Tensor

Weights = Mapping[str, Tensor]
Floats = NDArray[np.float32]
Apply = Callable[[ModelSpec, Weights], tuple[ModelSpec, Weights]]


@dataclass(frozen=True)
class Mutant:
    """`apply` returns the wrong model; one that equals the right one means that the mistake cannot be made there."""

    name: str
    apply: Apply


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


def _window(step: int) -> Apply:
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
    if not all(isinstance(mixer, AttentionSpec) for mixer in mixers):
        return spec, weights  # the weights would not fit
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


def _full_rotary(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    def change(_: int, mixer: AttentionSpec) -> AttentionSpec:
        return replace(mixer, rope=replace(mixer.rope, rotated_dims=mixer.head_dim))

    return _mixers(spec, change), weights


def _exact_embedding_scale(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    """Not rounded to bfloat16, where the model's own is."""
    return replace(spec, embedding_scale=math.sqrt(spec.model_width)), weights


def _changed(
    *roles: str, change: Callable[[Floats], Floats]
) -> Callable[[ModelSpec, Weights], tuple[ModelSpec, Weights]]:
    """Every tensor whose canonical name ends in one of `roles` is changed."""

    def apply(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
        changed = {
            name: Tensor.from_float32(np.ascontiguousarray(change(tensor.to_float32())))
            for name, tensor in weights.items()
            if name.endswith(roles)
        }
        return (spec, {**weights, **changed}) if changed else (spec, weights)

    return apply


def _gates_swapped(spec: ModelSpec, weights: Weights) -> tuple[ModelSpec, Weights]:
    """The input gate decides what is kept, the recurrence gate what is let in."""
    other = {"input_gate": "recurrence_gate", "recurrence_gate": "input_gate"}
    swapped = {}
    for name in weights:
        for one, partner in other.items():
            if f".{one}" in name:
                swapped[name] = weights[name.replace(one, partner)]
    return (spec, {**weights, **swapped}) if swapped else (spec, weights)


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
    Mutant("full rotary", _full_rotary),
    Mutant("embedding scale not rounded", _exact_embedding_scale),
    Mutant("no biases of the layers", _changed("_bias", change=np.zeros_like)),
    Mutant("no bias of the attention", _changed("attention.output_bias", change=np.zeros_like)),
    Mutant("no bias of the convolution", _changed("conv_bias", change=np.zeros_like)),
    Mutant("no biases of the gates", _changed("_gate_bias", change=np.zeros_like)),
    Mutant("gates transposed", _changed("input_gate", "recurrence_gate", change=lambda w: w.swapaxes(1, 2))),
    Mutant("gates swapped", _gates_swapped),
    Mutant("convolution backwards", _changed("recurrent.conv", change=lambda w: w[..., ::-1])),
    Mutant("decay of sigmoid(decay)", _changed("decay", change=np.negative)),
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
        rotated, rest = x[..., : 2 * cos.shape[-1]], x[..., 2 * cos.shape[-1] :]
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        cos, sin = cos[:, None], sin[:, None]
        return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2), rest), dim=-1)

    patch.setattr("gemma2_fast.reference.model.rope", neighbours)


REFERENCE_MUTANTS = {"cap after mask": cap_after_mask, "exact GELU": exact_gelu, "interleaved RoPE": interleaved_rope}


def no_reset(patch: pytest.MonkeyPatch) -> None:
    """The first token of a document is damped as every other."""

    def never_first(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *others, positions = inputs
        return rg_lru(*others, positions + 1)

    patch.setattr("gemma2_fast.reference.model.rg_lru", never_first)


def no_damping(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("gemma2_fast.reference.rg_lru.damping", torch.ones_like)


def bfloat16_state(patch: pytest.MonkeyPatch) -> None:
    """The recurrence is rounded to bfloat16 after every step, as if kept so."""

    def step_by_step(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        *rows, decay, state, positions = inputs
        outs = []
        for index in range(len(positions)):
            now = slice(index, index + 1)
            out, state = rg_lru(*(x[now] for x in rows), decay, state, positions[now])
            state = state.to(torch.bfloat16).to(decay.dtype)
            outs.append(out)
        return torch.cat(outs), state

    patch.setattr("gemma2_fast.reference.model.rg_lru", step_by_step)


RECURRENCE_MUTANTS = {"no reset": no_reset, "no sqrt(1 - a^2)": no_damping, "bfloat16 state": bfloat16_state}
