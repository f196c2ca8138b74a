"""What a model is and how it would run here, for `gemma2-fast info`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gemma2_fast import _core
from gemma2_fast.engine.cache_plan import PAGE_TOKENS
from gemma2_fast.engine.options import EnginePlan
from gemma2_fast.spec import AttentionSpec, LayerSpec, RecurrentSpec
from gemma2_fast.weights.load import Checkpoint


@dataclass(frozen=True)
class Description:
    """A checkpoint and the plan for it; nothing of either is allocated."""

    checkpoint: Checkpoint
    plan: EnginePlan

    def lines(self) -> list[str]:
        """The same facts as `to_json`, for people."""
        facts = self.to_json()
        model, run, cache = facts["model"], facts["run"], facts["cache"]
        lines = [
            f"model         {model['family']}, {model['parameters'] / 1e6:,.1f} M parameters, "
            f"{len(self.plan.spec.layers)} layers, width {model['width']}, vocabulary {model['vocab_size']:,}, "
            f"context {model['max_positions']:,}",
            f"weights       {_size(model['weight_bytes'])} in {', '.join(model['formats'])} ({self.checkpoint.path})",
        ]
        lines += [f"layers        {count:>3} x {text}" for text, count in model["layers"].items()]
        if model["final_softcap"] is not None:
            lines.append(f"final cap     {model['final_softcap']:g}")
        lines += [f"assumed       {name} (not stated in the file)" for name in model["assumed"]]
        lines += [
            f"backend       {run['backend']}, {run['instruction_set']} kernels of {', '.join(run['available'])}, "
            f"{run['num_threads']} threads, {run['compute_dtype']} activations",
            f"cache         {_size(cache['bytes'])} as {cache['kv_dtype']}: {cache['max_sequences']} sequences "
            f"of up to {cache['max_seq_len']:,} tokens, pages of {PAGE_TOKENS}, "
            f"steps of up to {cache['max_step_tokens']} tokens",
        ]
        for group in cache["groups"]:
            window = "all keys" if group["window_keys"] is None else f"window {group['window_keys']}"
            lines.append(
                f"  group       {group['layers']} layers, {group['kv_heads']} kv heads of {group['head_dim']}, "
                f"{window}: {group['blocks']} blocks, {_size(group['bytes'])}"
            )
        return lines

    def to_json(self) -> dict[str, Any]:
        spec, cache, checkpoint = self.plan.spec, self.plan.cache, self.checkpoint
        layers: dict[str, int] = {}
        for layer in spec.layers:
            text = _layer_text(layer)
            layers[text] = layers.get(text, 0) + 1
        return {
            "model": {
                "path": str(checkpoint.path),
                "family": spec.family,
                "parameters": checkpoint.num_parameters,
                "weight_bytes": checkpoint.num_weight_bytes,
                "formats": list(checkpoint.matrix_formats),
                "width": spec.model_width,
                "vocab_size": spec.vocab_size,
                "max_positions": spec.max_positions,
                "final_softcap": spec.final_softcap,
                "layers": layers,
                "assumed": list(spec.assumed),
            },
            "run": {
                "backend": self.plan.backend,
                "instruction_set": self.plan.instruction_set,
                "available": _core.instruction_sets(),
                "num_threads": self.plan.num_threads,
                "compute_dtype": self.plan.compute_dtype,
            },
            "cache": {
                "bytes": cache.num_bytes,
                "kv_dtype": cache.kv_dtype,
                "max_sequences": cache.max_sequences,
                "max_seq_len": cache.max_seq_len,
                "max_step_tokens": cache.max_step_tokens,
                "page_tokens": PAGE_TOKENS,
                "groups": [
                    {
                        "layers": len(group.layers),
                        "kv_heads": group.num_kv_heads,
                        "head_dim": group.head_dim,
                        "window_keys": group.window_keys,
                        "blocks": group.num_blocks,
                        "bytes": group.num_blocks * group.block_bytes(cache.kv_dtype),
                    }
                    for group in cache.paged
                ],
            },
        }


def _layer_text(layer: LayerSpec) -> str:
    match layer.mixer:
        case AttentionSpec() as a:
            window = "global" if a.window_keys is None else f"window {a.window_keys}"
            cap = "" if a.score_softcap is None else f", cap {a.score_softcap:g}"
            norm = ", q/k norm" if a.qk_norm else ""
            text = f"attention ({window}, {a.num_query_heads}/{a.num_kv_heads} heads of {a.head_dim}{cap}{norm})"
        case RecurrentSpec() as r:
            text = f"recurrence (width {r.width}, convolution {r.conv_width})"
    return f"{text}, MLP {layer.mlp.width}"


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} bytes"
