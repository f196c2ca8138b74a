"""DeepMind's PyTorch code for RecurrentGemma on a checkpoint of Hugging Face's layout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file

# The package's own beginning asks for JAX and Flax, which its PyTorch half does not use.
found = find_spec("recurrentgemma")
if found is None:
    raise ModuleNotFoundError("No module named 'recurrentgemma'")
package = ModuleType("recurrentgemma")
package.__path__ = list(found.submodule_search_locations or ())
sys.modules["recurrentgemma"] = package
from recurrentgemma import common  # noqa: E402
from recurrentgemma.torch import griffin  # noqa: E402

Tensors = dict[str, torch.Tensor]
KINDS = {"recurrent": common.TemporalBlockType.RECURRENT, "attention": common.TemporalBlockType.ATTENTION}
# DeepMind's module, ours beside it; both have a weight and a bias where there is one.
LINEARS = {
    "recurrent": {name: name for name in ("linear_x", "linear_y", "linear_out")},
    "attention": {"proj_q": "q_proj", "proj_k": "k_proj", "proj_v": "v_proj", "proj_final": "o_proj"},
}
GATES = {
    "rg_lru.a_param": "rg_lru.recurrent_param",
    "rg_lru.input_gate.w": "rg_lru.input_gate_weight",
    "rg_lru.input_gate.b": "rg_lru.input_gate_bias",
    "rg_lru.a_gate.w": "rg_lru.recurrent_gate_weight",
    "rg_lru.a_gate.b": "rg_lru.recurrent_gate_bias",
}


def block_weights(stored: Tensors, layer: str, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """A block's tensors under DeepMind's names, which lay out convolution, gate and up otherwise."""
    mixer, theirs = f"{layer}temporal_block.", f"{kind}_block."
    for name in ("temporal_pre_norm", "channel_pre_norm"):
        yield f"{name}.scale", stored[f"{layer}{name}.weight"]
    for deepmind, ours in LINEARS[kind].items():
        for part in ("weight", "bias"):
            if f"{mixer}{ours}.{part}" in stored:
                yield f"{theirs}{deepmind}.{part}", stored[f"{mixer}{ours}.{part}"]
    if kind == "recurrent":
        yield f"{theirs}conv_1d.w", stored[f"{mixer}conv_1d.weight"][:, 0].T.contiguous()
        yield f"{theirs}conv_1d.b", stored[f"{mixer}conv_1d.bias"]
        for deepmind, ours in GATES.items():
            yield theirs + deepmind, stored[mixer + ours]
    mlp = f"{layer}mlp_block."
    gate_and_up = ("gate_proj", "up_proj")
    yield "mlp_block.ffw_up.w", torch.stack([stored[f"{mlp}{name}.weight"].T for name in gate_and_up])
    yield "mlp_block.ffw_up.b", torch.stack([stored[f"{mlp}{name}.bias"] for name in gate_and_up])[:, None, None]
    for part in ("weight", "bias"):
        yield f"mlp_block.ffw_down.{part}", stored[f"{mlp}down_proj.{part}"]


class RecurrentGemma:
    """A checkpoint's directory. settings: model, threads, options (dtype, as stored by default)."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.versions = {"torch": torch.__version__, "recurrentgemma": version("recurrentgemma")}
        torch.set_num_threads(settings["threads"])
        directory = Path(settings["model"])
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        stored: Tensors = {}
        for file in sorted(directory.glob("*.safetensors")):
            stored |= load_file(file)
        dtype = settings["options"].get("dtype")
        if dtype is not None:
            stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in stored.items()}
        pattern = config["block_types"]
        kinds = [pattern[index % len(pattern)] for index in range(config["num_hidden_layers"])]
        self._model = griffin.Griffin(
            common.GriffinConfig(
                vocab_size=config["vocab_size"],
                width=config["hidden_size"],
                mlp_expanded_width=config["intermediate_size"] // 2,
                num_heads=config["num_attention_heads"],
                block_types=tuple(KINDS[kind] for kind in kinds),
                embeddings_scale_by_sqrt_dim=True,
                attention_window_size=config["attention_window_size"],
                logits_soft_cap=config["logits_soft_cap"],
                lru_width=config["lru_width"],
            ),
            gradient_checkpointing=False,
            device="meta",
        )
        weights = {
            "embedder.input_embedding": stored["model.embed_tokens.weight"],
            "final_norm.scale": stored["model.final_norm.weight"],
        }
        for index, kind in enumerate(kinds):
            for name, tensor in block_weights(stored, f"model.layers.{index}.", kind):
                weights[f"blocks.{index}.{name}"] = tensor
        self._model.load_state_dict(weights, assign=True)
        self._model.train(False)
        self._random = torch.Generator().manual_seed(0)

    def prefill(self, tokens: int) -> float:
        ids = self._ids(1, tokens)
        start = time.perf_counter()
        self._prompt(ids)
        return time.perf_counter() - start

    def decode(self, batch: int, context: int, steps: int) -> float:
        _, cache = self._prompt(self._ids(batch, context))
        start = time.perf_counter()
        for step in range(steps):
            _, cache = self._step(self._ids(batch, 1), context + step, cache)
        return time.perf_counter() - start

    def likeliest(self, ids: list[int]) -> list[tuple[int, float]]:
        logits, _ = self._prompt(torch.tensor([ids]))
        top = logits[0, -1].float().topk(5)
        return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))

    def _ids(self, batch: int, tokens: int) -> torch.Tensor:
        most = min(200_000, self._model.config.vocab_size)
        return torch.randint(min(300, most // 2), most, (batch, tokens), generator=self._random)

    def _prompt(self, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """As DeepMind's sampler does it: all tokens but the last without logits, then the last."""
        last = ids.shape[1] - 1
        cache = self._step(ids[:, :last], 0, None, return_logits=False)[1] if last else None
        return self._step(ids[:, last:], last, cache)

    def _step(self, ids: torch.Tensor, position: int, cache: Any, return_logits: bool = True) -> tuple[Any, Any]:
        positions = position + torch.arange(ids.shape[1]).expand(ids.shape)
        with torch.no_grad():
            return self._model(ids, positions, cache, return_logits)  # type: ignore[no-any-return]


def load(settings: dict[str, Any]) -> RecurrentGemma:
    return RecurrentGemma(settings)
