"""What a model is and how it would run here, for `gemma2-fast info`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import CachePlan
from gemma2_fast.engine.options import EnginePlan
from gemma2_fast.spec import AttentionSpec, LayerSpec, RecurrentSpec
from gemma2_fast.weights.load import Checkpoint


@dataclass(frozen=True)
class Description:
    """A checkpoint and the plan for it, or why there is none; nothing of either is allocated."""

    checkpoint: Checkpoint
    plan: EnginePlan | None
    problem: str | None

    def lines(self) -> list[str]:
        """The same facts as `to_json`, for people."""
        model = self._model()
        lines = [
            f"model         {model['family']}, {model['parameters'] / 1e6:,.1f} M parameters, "
            f"{len(self.checkpoint.spec.layers)} layers, width {model['width']}, vocabulary {model['vocab_size']:,}, "
            f"context {model['max_positions']:,}",
            f"weights       {_size(model['weight_bytes'])} in {', '.join(model['formats'])}, "
            f"{model['bits_per_weight']:.2f} bits a weight ({self.checkpoint.path})",
        ]
        origin = self.checkpoint.origin
        if origin is not None:
            lines.append(
                f"quantised     to {origin.quantization} from {origin.source}, by gemma2-fast {origin.tool_version}"
            )
        lines += [f"layers        {count:>3} x {text}" for text, count in model["layers"].items()]
        if model["final_softcap"] is not None:
            lines.append(f"final cap     {model['final_softcap']:g}")
        lines += [f"assumed       {name} (not stated in the file)" for name in model["assumed"]]
        if self.plan is not None:
            lines += _plan_lines(self.plan)
        if self.problem is not None:
            lines.append(f"cannot run    {self.problem}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """run and cache are None when no plan can be made; problem says why the model cannot run."""
        return {
            "model": self._model(),
            "run": None if self.plan is None else _run(self.plan),
            "cache": None if self.plan is None else _cache(self.plan.cache),
            "problem": self.problem,
        }

    def _model(self) -> dict[str, Any]:
        checkpoint = self.checkpoint
        spec = checkpoint.spec if self.plan is None else self.plan.spec
        layers: dict[str, int] = {}
        for layer in spec.layers:
            text = _layer_text(layer)
            layers[text] = layers.get(text, 0) + 1
        return {
            "path": str(checkpoint.path),
            "family": spec.family,
            "parameters": checkpoint.num_parameters,
            "weight_bytes": checkpoint.num_weight_bytes,
            "formats": list(checkpoint.matrix_formats),
            "bits_per_weight": checkpoint.bits_per_weight,
            "origin": None if checkpoint.origin is None else asdict(checkpoint.origin),
            "width": spec.model_width,
            "vocab_size": spec.vocab_size,
            "max_positions": spec.max_positions,
            "final_softcap": spec.final_softcap,
            "layers": layers,
            "assumed": list(spec.assumed),
        }


def _run(plan: EnginePlan) -> dict[str, Any]:
    return {
        "backend": plan.backend,
        "instruction_set": plan.instruction_set,
        "available": _core.instruction_sets(),
        "num_threads": plan.num_threads,
        "gpu": None if plan.gpu is None else f"{plan.gpu.device.name} (sm_{plan.gpu.device.arch})",
        "quantization": plan.quantization,
        "compute_dtype": plan.compute_dtype,
        "activations": plan.activations,
        "logits_bytes": plan.max_logits_rows * plan.spec.vocab_size * 4,
    }


def _cache(cache: CachePlan) -> dict[str, Any]:
    groups = [
        {
            "layers": len(group.layers),
            "kv_heads": group.num_kv_heads,
            "head_dim": group.head_dim,
            "window_keys": group.window_keys,
            "blocks": group.num_blocks,
            "bytes": group.num_blocks * group.block_bytes(cache.kv_dtype, cache.page_tokens),
        }
        for group in cache.paged
    ]
    state = cache.recurrent
    return {
        "bytes": cache.num_bytes,
        "kv_dtype": cache.kv_dtype,
        "max_sequences": cache.max_sequences,
        "max_seq_len": cache.max_seq_len,
        "max_step_tokens": cache.max_step_tokens,
        "page_tokens": cache.page_tokens,
        "groups": groups,
        "state": None if state is None else {"slots": state.num_slots, "bytes": state.num_slots * state.slot_bytes()},
    }


def _plan_lines(plan: EnginePlan) -> list[str]:
    run, cache = _run(plan), _cache(plan.cache)
    products = ", int8 in products with quantised weights" if run["activations"] == "int8" else ""
    kernels = f"{run['instruction_set']} kernels of {', '.join(run['available'])}, {run['num_threads']} threads"
    if run["gpu"] is not None:
        kernels = run["gpu"]
    quantized = [] if plan.quantization is None else [f"quantising    to {plan.quantization} while loading, in memory"]
    lines = [
        *quantized,
        f"backend       {run['backend']}, {kernels}, {run['compute_dtype']} activations{products}",
        f"cache         {_size(cache['bytes'])} as {cache['kv_dtype']}: {cache['max_sequences']} sequences "
        f"of up to {cache['max_seq_len']:,} tokens, pages of {cache['page_tokens']}, "
        f"steps of up to {cache['max_step_tokens']} tokens",
    ]
    for group in cache["groups"]:
        window = "all keys" if group["window_keys"] is None else f"window {group['window_keys']}"
        lines.append(
            f"  group       {group['layers']} layers, {group['kv_heads']} kv heads of {group['head_dim']}, "
            f"{window}: {group['blocks']} blocks, {_size(group['bytes'])}"
        )
    if cache["state"] is not None:
        lines.append(f"  state       {cache['state']['slots']} slots, {_size(cache['state']['bytes'])}")
    lines.append(f"logits        {_size(run['logits_bytes'])} at most ({plan.max_logits_rows} rows a step)")
    return lines


def _layer_text(layer: LayerSpec) -> str:
    match layer.mixer:
        case AttentionSpec() as a:
            window = "global" if a.window_keys is None else f"window {a.window_keys}"
            cap = "" if a.score_softcap is None else f", cap {a.score_softcap:g}"
            norm = ", q/k norm" if a.qk_norm else ""
            text = f"attention ({window}, {a.num_query_heads}/{a.num_kv_heads} heads of {a.head_dim}{cap}{norm})"
        case RecurrentSpec() as r:
            text = f"recurrence (width {r.width}, {r.num_gate_blocks} gate blocks, convolution {r.conv_width})"
    return f"{text}, MLP {layer.mlp.width}"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} bytes"
