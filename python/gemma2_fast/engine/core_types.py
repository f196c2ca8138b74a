"""Specs and cache plans as the C++ core takes them."""

from __future__ import annotations

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.spec import AttentionSpec, LayerSpec, ModelSpec, RecurrentSpec


def core_cache_plan(plan: CachePlan) -> _core.CachePlan:
    """The C++ mirror of a cache plan."""
    paged = [
        _core.PagedKvGroup(
            layers=list(group.layers),
            num_kv_heads=group.num_kv_heads,
            head_dim=group.head_dim,
            window_keys=group.window_keys,
            num_blocks=group.num_blocks,
            table_width=group.table_width,
        )
        for group in plan.paged
    ]
    recurrent = None
    if plan.recurrent is not None:
        recurrent = _core.RecurrentStateGroup(
            layers=list(plan.recurrent.layers),
            width=plan.recurrent.width,
            conv_tail=plan.recurrent.conv_tail,
            num_slots=plan.recurrent.num_slots,
            num_snapshots=plan.recurrent.num_snapshots,
        )
    return _core.CachePlan(page_tokens=plan.page_tokens, paged=paged, recurrent=recurrent)


def core_spec(spec: ModelSpec) -> _core.ModelSpec:
    return _core.ModelSpec(
        model_width=spec.model_width,
        vocab_size=spec.vocab_size,
        embedding_scale=spec.embedding_scale,
        norm_epsilon=spec.norm_epsilon,
        final_softcap=spec.final_softcap,
        layers=[_core_layer(layer) for layer in spec.layers],
    )


def _core_layer(layer: LayerSpec) -> _core.LayerSpec:
    return _core.LayerSpec(
        mixer=_core_mixer(layer.mixer),
        mlp_width=layer.mlp.width,
        mlp_bias=layer.mlp.bias,
        norm_after_mixer=layer.norms.after_mixer,
        norm_after_mlp=layer.norms.after_mlp,
    )


def _core_mixer(mixer: AttentionSpec | RecurrentSpec) -> _core.AttentionSpec | _core.RecurrentSpec:
    match mixer:
        case AttentionSpec():
            return _core.AttentionSpec(
                num_query_heads=mixer.num_query_heads,
                num_kv_heads=mixer.num_kv_heads,
                head_dim=mixer.head_dim,
                query_scale=mixer.query_scale,
                score_softcap=mixer.score_softcap,
                window_keys=mixer.window_keys,
                qk_norm=mixer.qk_norm,
                output_bias=mixer.output_bias,
                inverse_frequencies=mixer.rope.inverse_frequencies(),
            )
        case RecurrentSpec():
            return _core.RecurrentSpec(
                width=mixer.width, num_gate_blocks=mixer.num_gate_blocks, conv_width=mixer.conv_width
            )
