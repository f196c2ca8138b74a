"""What the C++ CPU step refuses before a kernel trusts it: specs, weights, plans and batches that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gemma2_fast import _core
from gemma2_fast.engine.engine import core_cache_plan, cpu_step
from gemma2_fast.engine.options import EngineOptions, EnginePlan, plan_engine
from gemma2_fast.errors import Gemma2FastError
from tests.support.checkpoints import quantisable_spec, random_weights

SPEC = quantisable_spec("gemma2")
WEIGHTS = random_weights(SPEC, "Q8_0")


def plan() -> EnginePlan:
    return plan_engine(SPEC, ("Q8_0",), EngineOptions(max_seq_len=64, max_batch_size=1, num_threads=1))


def build(change: Callable[[dict[str, Any]], None] = lambda _: None, paged: list[Any] | None = None) -> _core.CpuStep:
    """A step of two layers' attention, made of raw parts so that they can be wrong."""
    parts: dict[str, Any] = {
        "num_query_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "query_scale": 0.1,
        "score_softcap": None,
        "window_keys": None,
        "qk_norm": False,
        "output_bias": False,
        "inverse_frequencies": [1.0] * 32,
        "weights": {name: (t.format.name, t.shape, t.data) for name, t in WEIGHTS.items()},
        "max_step_tokens": 8,
    }
    change(parts)
    weights, step_tokens = parts.pop("weights"), parts.pop("max_step_tokens")
    layer = _core.LayerSpec(
        mixer=_core.AttentionSpec(**parts),
        mlp_width=512,
        mlp_bias=False,
        norm_after_mixer=True,
        norm_after_mlp=True,
    )
    spec = _core.ModelSpec(
        model_width=256, vocab_size=512, embedding_scale=16.0, norm_epsilon=1e-6, final_softcap=None, layers=[layer]
    )
    return _core.CpuStep(
        spec=spec,
        weights=weights,
        plan=_core.CachePlan(page_tokens=32, paged=[group()] if paged is None else paged),
        activations="float32",
        kv_dtype="float32",
        instruction_set="auto",
        num_threads=1,
        max_step_tokens=step_tokens,
        max_logits_rows=8,
    )


def group(**changes: Any) -> _core.PagedKvGroup:
    values: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 64, "window_keys": None, "num_blocks": 2, "table_width": 2}
    return _core.PagedKvGroup(layers=[0], **{**values, **changes})


def short(parts: dict[str, Any]) -> None:
    name, shape, data = parts["weights"]["layers.0.mlp.up"]
    parts["weights"]["layers.0.mlp.up"] = (name, shape, data[:-34])


BAD_PARTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "more kv heads than heads": (lambda p: p.update(num_query_heads=1), "multiple of kv heads"),
    "heads that do not divide": (lambda p: p.update(num_query_heads=3), "multiple of kv heads"),
    "negative heads": (lambda p: p.update(num_query_heads=-4, num_kv_heads=-2), "multiple of kv heads"),
    "RoPE wider than a head": (lambda p: p.update(inverse_frequencies=[1.0] * 33), "RoPE"),
    "no window": (lambda p: p.update(window_keys=0), "window"),
    "no cap": (lambda p: p.update(score_softcap=0.0), "cap"),
    "a missing bias": (lambda p: p.update(output_bias=True), "attention.output_bias is missing"),
    "a missing tensor": (lambda p: p["weights"].pop("final_norm"), "final_norm is missing"),
    "too few bytes": (short, "mlp.up has"),
    "no tensor": (lambda p: p["weights"].update(final_norm=3), "final_norm must be"),
    "an unknown format": (lambda p: p["weights"].update(final_norm=("Q9", (1,), WEIGHTS["final_norm"].data)), "Q9"),
    "too many tokens": (lambda p: p.update(max_step_tokens=2**59), "max_step_tokens"),
}


@pytest.mark.parametrize("name", BAD_PARTS)
def test_parts_that_do_not_fit(name: str) -> None:
    build()
    change, message = BAD_PARTS[name]
    with pytest.raises(Gemma2FastError, match=message):
        build(change)


@pytest.mark.parametrize("changes", [{"num_kv_heads": 1}, {"head_dim": 4096}, {"window_keys": 8}, {"num_blocks": 0}])
def test_a_cache_group_that_does_not_fit(changes: dict[str, Any]) -> None:
    with pytest.raises(Gemma2FastError, match="layer 0"):
        build(paged=[group(**changes)])


def test_a_loop_with_another_vocabulary_or_cache() -> None:
    """The loop's limits and plan are not the step's: an error for the request, not a read outside the weights."""
    own = plan()
    core_plan = core_cache_plan(own.cache)
    limits = {"max_running_sequences": 1, "max_step_tokens": 1, "max_seq_len": 64, "max_logits_rows": 1}
    other = core_cache_plan(replace(own.cache, paged=own.cache.paged[:1]))
    for cache_plan, vocab_size, message in ((core_plan, 2**20, "vocabulary"), (other, 512, "block tables")):
        loop = _core.DecodeLoop(
            cpu_step(own, WEIGHTS, core_plan), cache_plan, _core.Limits(vocab_size=vocab_size, **limits)
        )
        ids = [2**20 - 1, 1] if vocab_size > 512 else [1, 2]
        sequence = loop.submit(_core.Request(token_ids=ids, sampling=_core.SamplingParams(max_tokens=1)))
        last = loop.wait(sequence, 20.0)[-1]
        loop.close()
        assert last.finish_reason == "error"
        assert last.message is not None
        assert message in last.message
