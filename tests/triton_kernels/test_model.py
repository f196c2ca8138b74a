"""A small Gemma 2 made of nothing but the kernels, in Triton's interpreter, beside the reference.

Eight kernels a layer: query-key-value product, rotation with the cache write, attention, output product, both norms
around the sum, gate and up with the activation, down product, and the norms again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from gemma2_fast.reference.dtypes import torch_dtype
from gemma2_fast.reference.model import ReferenceModel
from gemma2_fast.reference.rope import rope_tables
from gemma2_fast.spec import AttentionSpec, ModelSpec
from gemma2_fast.triton_kernels.attention_decode import attention_decode
from gemma2_fast.triton_kernels.attention_prefill import attention_prefill, prefill_tiles
from gemma2_fast.triton_kernels.embed import embed
from gemma2_fast.triton_kernels.geglu import geglu
from gemma2_fast.triton_kernels.matmul import matmul
from gemma2_fast.triton_kernels.matmul_tiled import matmul_tiled
from gemma2_fast.triton_kernels.rms_norm import rms_norm, rms_norm_add
from gemma2_fast.triton_kernels.rope import rope
from tests.support.tiny_models import TinyModel, tiny_model

# gelu(x) of a large negative x divides by infinity, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")

PAGE, MAX_POSITIONS, SPLITS = 16, 64, 2
BLOCKS = {"rows": 16, "cols": 64}


class KernelModel:
    """One sequence after another's tokens: `step` appends some and gives the logits of the last."""

    def __init__(self, model: TinyModel) -> None:
        self.spec: ModelSpec = model.spec
        self.weights = {name: torch.tensor(stored.to_float32()) for name, stored in model.weights.items()}
        self.context = 0
        width = -(-MAX_POSITIONS // PAGE)
        order = np.random.default_rng(0).permutation(width + 2)[:width].astype(np.int32)
        self.block_table = torch.from_numpy(order)[None]
        self.pages = []
        for index, layer in enumerate(self.spec.layers):
            assert isinstance(layer.mixer, AttentionSpec)
            shape = (width + 2, 2, layer.mixer.num_kv_heads, PAGE, layer.mixer.head_dim)
            self.pages.append(torch.full(shape, torch.nan))
            attention = f"layers.{index}.attention."
            roles = [self.weights[attention + role] for role in ("query", "key", "value")]
            self.weights[attention + "qkv"] = torch.cat(roles)
            mlp = f"layers.{index}.mlp."
            self.weights[mlp + "gate_up"] = torch.cat([self.weights[mlp + "gate"], self.weights[mlp + "up"]])

    def logits(self, x: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
        out = torch.full((len(tokens), self.spec.vocab_size), torch.nan)
        matmul(x, self.weights["embedding"], out, row_index=torch.tensor(tokens, dtype=torch.int32), **BLOCKS)
        return out

    def product(self, x: torch.Tensor, name: str, gated: bool = False) -> torch.Tensor:
        """Up to sixteen tokens at once with the activation; of more, as in a prefill, it has its own kernel."""
        weight = self.weights[name]
        out = torch.full((len(x), len(weight) // (1 + gated)), torch.nan)
        if len(x) <= 16:
            matmul(x, weight, out, geglu=gated, **BLOCKS)
            return out
        whole = torch.full((len(x), len(weight)), torch.nan)
        matmul_tiled(x, weight, whole, tile_tokens=16, tile_rows=32, cols=64)
        if not gated:
            return whole
        geglu(whole, out, block=64)
        return out

    def step(self, token_ids: Sequence[int]) -> np.ndarray:
        tokens, context, epsilon = len(token_ids), self.context, self.spec.norm_epsilon
        positions = torch.arange(context, context + tokens, dtype=torch.int32)
        ids, first_token = torch.tensor(token_ids, dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32)
        contexts, sequences = torch.tensor([context], dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
        residual = torch.full((tokens, self.spec.model_width), torch.nan)
        embed(ids, self.weights["embedding"], self.spec.embedding_scale, residual, block=64)
        normed = torch.full_like(residual, torch.nan)
        gain = self.weights["layers.0.norm_before_mixer"]
        rms_norm(residual, gain, epsilon, normed)
        for index, layer in enumerate(self.spec.layers):
            prefix, mixer = f"layers.{index}.", layer.mixer
            assert isinstance(mixer, AttentionSpec)
            heads = mixer.num_query_heads + 2 * mixer.num_kv_heads
            qkv = self.product(normed, prefix + "attention.qkv").view(tokens, heads, mixer.head_dim)
            cos, sin = rope_tables(mixer.rope, torch.arange(MAX_POSITIONS), torch.float32)
            rope(qkv, positions, sequences, cos, sin, self.pages[index], self.block_table)
            queries = qkv[:, : mixer.num_query_heads]
            attended = torch.full(queries.shape, torch.nan)
            self.attend(index, mixer, queries, first_token, contexts, attended)
            mixed = self.product(attended.flatten(1), prefix + "attention.output")
            after = self.weights[prefix + "norm_after_mixer"] if layer.norms.after_mixer else None
            before = self.weights[prefix + "norm_before_mlp"]
            rms_norm_add(mixed, after, residual, before, epsilon, normed)
            hidden = self.product(normed, prefix + "mlp.gate_up", gated=True)
            down = self.product(hidden, prefix + "mlp.down")
            after = self.weights[prefix + "norm_after_mlp"] if layer.norms.after_mlp else None
            last = index + 1 == len(self.spec.layers)
            before = self.weights["final_norm" if last else f"layers.{index + 1}.norm_before_mixer"]
            rms_norm_add(down, after, residual, before, epsilon, normed)
        self.context += tokens
        logits = self.logits(normed, [tokens - 1])[0]
        cap = self.spec.final_softcap
        return (logits if cap is None else cap * torch.tanh(logits / cap)).numpy()

    def attend(
        self, index: int, mixer: AttentionSpec, queries: torch.Tensor, first_token: torch.Tensor,
        contexts: torch.Tensor, out: torch.Tensor,
    ) -> None:  # fmt: skip
        rule = {
            "query_scale": mixer.query_scale,
            "score_softcap": mixer.score_softcap,
            "window_keys": mixer.window_keys,
        }
        group = mixer.num_query_heads // mixer.num_kv_heads
        shared = (queries, self.pages[index], self.block_table, first_token, contexts)
        if len(queries) * group <= 16:
            part = (1, mixer.num_kv_heads, SPLITS)
            attention_decode(
                *shared, out, torch.full((*part, 16, mixer.head_dim), torch.nan), torch.full((*part, 2, 16), torch.nan),
                torch.zeros(part[:2], dtype=torch.int32), **rule, block=16,
            )  # fmt: skip
            return
        tiles = torch.tensor(prefill_tiles([(self.context, len(queries))], group, 16), dtype=torch.int32)
        attention_prefill(*shared, tiles, out, **rule, tile=16, block=16)


@pytest.mark.slow
def test_logits_are_those_of_the_reference(tmp_path: Path) -> None:
    """A prompt in two chunks, then single tokens, past the window of nine keys by more than a page."""
    model = tiny_model("gemma2", tmp_path, head_dim=16)
    prompt = [2, *np.random.default_rng(0).integers(3, 500, 43).tolist()]
    kernels, ours = KernelModel(model), []
    kernels.step(prompt[:20])
    for begin, end in [(20, 40), (40, 41), (41, 44)]:
        ours.append(kernels.step(prompt[begin:end]))
    exact, usual = (
        ReferenceModel(model.spec, model.weights, torch_dtype(dtype)).logits(prompt)[[39, 40, 43]].numpy()
        for dtype in ("float64", "float32")
    )
    error = np.abs(np.stack(ours) - exact).max()
    assert error <= 4 * np.abs(usual - exact).max() + 1e-5 * np.abs(exact).max()
    wrong = ReferenceModel(model.spec, model.weights, torch_dtype("float64")).logits([5, *prompt[1:]])[43].numpy()
    assert np.abs(wrong - exact[2]).max() > 100 * error
