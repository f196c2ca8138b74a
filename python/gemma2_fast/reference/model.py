"""A whole model, walked layer by layer from its spec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from gemma2_fast.engine.step_batch import StepBatch
from gemma2_fast.errors import RequestError
from gemma2_fast.reference.attention import attention
from gemma2_fast.reference.batch import flat_batch
from gemma2_fast.reference.block_diagonal import block_diagonal
from gemma2_fast.reference.cache import Cache, ContiguousCache, LayerState, token_spans
from gemma2_fast.reference.conv1d import conv1d
from gemma2_fast.reference.dtypes import wide
from gemma2_fast.reference.embed import embed
from gemma2_fast.reference.geglu import geglu
from gemma2_fast.reference.matmul import matmul
from gemma2_fast.reference.rg_lru import rg_lru
from gemma2_fast.reference.rms_norm import rms_norm
from gemma2_fast.reference.rope import rope, rope_tables
from gemma2_fast.reference.softcap import softcap
from gemma2_fast.spec import AttentionSpec, LayerSpec, ModelSpec, RecurrentSpec, RopeSpec
from gemma2_fast.weights.manifest import check_weights
from gemma2_fast.weights.tensor import Tensor as StoredTensor

CHUNK_TOKENS = 512  # of `logits` and `generate_greedy`: bounds the scores [H, T, S] held at once


class ReferenceModel:
    """Computes in one dtype (float64, float32 or bfloat16) what the spec says, one op after another.

    Weights are rounded to the dtype once. Activations x are [T, E], flat over the sequences of a StepBatch.
    """

    def __init__(self, spec: ModelSpec, weights: Mapping[str, StoredTensor], dtype: torch.dtype) -> None:
        check_weights(spec, weights, "reference")
        self.spec = spec
        self.dtype = dtype
        self._weights = {name: torch.tensor(stored.to_float32(), dtype=dtype) for name, stored in weights.items()}

    def forward(self, batch: StepBatch, cache: Cache) -> Tensor:
        """Append the batch's tokens to the cache and return the logits [L, V] of the tokens that ask for them."""
        logits = self.uncapped_logits(batch, cache)
        return logits if self.spec.final_softcap is None else softcap(logits, self.spec.final_softcap)

    def uncapped_logits(self, batch: StepBatch, cache: Cache) -> Tensor:
        """`forward` without the final soft cap: what a backend owes the decode loop, which caps what it reads."""
        cache.copy_states(batch)
        token_ids, positions = (torch.tensor(ids, dtype=torch.int64) for ids in (batch.token_ids, batch.positions))
        ropes = {layer.mixer.rope for layer in self.spec.layers if isinstance(layer.mixer, AttentionSpec)}
        tables = {spec: rope_tables(spec, positions, self.dtype) for spec in ropes}
        x = embed(token_ids, self._weights["embedding"], self.spec.embedding_scale)
        for index, layer in enumerate(self.spec.layers):
            x = self._layer(index, layer, x, batch, cache, tables)
        wanted = x[torch.tensor(batch.logits_token, dtype=torch.int64)]
        return matmul(self._norm(wanted, "final_norm"), self._weights["embedding"])

    def logits(self, token_ids: Sequence[int], chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
        """Next-token logits [T, V] of one sequence from its start."""
        cache = ContiguousCache()
        return torch.cat([self.forward(batch, cache) for batch in _prompt_chunks(token_ids, chunk_tokens)])

    def generate_greedy(self, token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """The `num_tokens` likeliest next ids, one at a time; among equals the lowest id."""
        cache = ContiguousCache()
        for batch in _prompt_chunks(token_ids, CHUNK_TOKENS):
            last = replace(batch, logits_token=np.array([len(batch.token_ids) - 1], dtype=np.int32))
            logits = self.forward(last, cache)
        new: list[int] = []
        while len(new) < num_tokens:
            if new:
                logits = self.forward(flat_batch([new[-1:]], [len(token_ids) + len(new) - 1]), cache)
            new.append(int(logits.argmax()))
        return new

    def _layer(
        self,
        index: int,
        layer: LayerSpec,
        x: Tensor,
        batch: StepBatch,
        cache: Cache,
        tables: Mapping[RopeSpec, tuple[Tensor, Tensor]],
    ) -> Tensor:
        prefix = f"layers.{index}."
        normed = self._norm(x, prefix + "norm_before_mixer")
        match layer.mixer:
            case AttentionSpec() as spec:
                mixed = self._attend(index, spec, normed, batch, cache, tables[spec.rope])
            case RecurrentSpec() as spec:
                mixed = self._recur(index, spec, normed, batch, cache)
        x = x + (self._norm(mixed, prefix + "norm_after_mixer") if layer.norms.after_mixer else mixed)

        normed = self._norm(x, prefix + "norm_before_mlp")
        gated = geglu(self._linear(normed, prefix + "mlp.gate"), self._linear(normed, prefix + "mlp.up"))
        down = self._linear(gated, prefix + "mlp.down")
        return x + (self._norm(down, prefix + "norm_after_mlp") if layer.norms.after_mlp else down)

    def _attend(
        self,
        index: int,
        spec: AttentionSpec,
        x: Tensor,
        batch: StepBatch,
        cache: Cache,
        table: tuple[Tensor, Tensor],
    ) -> Tensor:
        prefix = f"layers.{index}.attention."
        queries = self._linear(x, prefix + "query").view(-1, spec.num_query_heads, spec.head_dim)
        keys = self._linear(x, prefix + "key").view(-1, spec.num_kv_heads, spec.head_dim)
        values = self._linear(x, prefix + "value").view(-1, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm:
            queries, keys = self._norm(queries, prefix + "query_norm"), self._norm(keys, prefix + "key_norm")
        queries, keys = rope(queries, *table), rope(keys, *table)
        cache.append(index, batch, keys, values)

        out = torch.empty_like(queries)
        for sequence, first, end, context in token_spans(batch):
            # Both caches are asked for the same keys, so that they give the same bits.
            first_key = 0 if spec.window_keys is None else max(0, context + 1 - spec.window_keys)
            stored = cache.read(index, batch, sequence, first_key, context + end - first)
            out[first:end] = attention(
                queries[first:end],
                *(part.to(self.dtype) for part in stored),
                first_query=context,
                first_key=first_key,
                query_scale=spec.query_scale,
                score_softcap=spec.score_softcap,
                window_keys=spec.window_keys,
            )
        return self._linear(out.flatten(1), prefix + "output")

    def _recur(self, index: int, spec: RecurrentSpec, x: Tensor, batch: StepBatch, cache: Cache) -> Tensor:
        prefix = f"layers.{index}.recurrent."
        inputs, gates = self._linear(x, prefix + "linear_x"), self._linear(x, prefix + "linear_y")
        positions = torch.tensor(batch.positions, dtype=torch.int64)

        out = torch.empty_like(inputs)
        for sequence, first, end, context in token_spans(batch):
            before = cache.read_state(index, batch, sequence) if context else self._first_state(spec)
            span = slice(first, end)
            conv, tail = conv1d(
                inputs[span],
                self._weights[prefix + "conv"],
                self._weights[prefix + "conv_bias"],
                before.conv_tail,
                positions[span],
            )
            out[span], state = rg_lru(
                conv,
                self._gate(conv, prefix + "input_gate"),
                self._gate(conv, prefix + "recurrence_gate"),
                self._weights[prefix + "decay"],
                before.recurrence,
                positions[span],
            )
            cache.write_state(index, batch, sequence, LayerState(state, tail))
        return self._linear(geglu(gates, out), prefix + "linear_out")

    def _first_state(self, spec: RecurrentSpec) -> LayerState:
        return LayerState(
            torch.zeros(spec.width, dtype=wide(self.dtype)),
            torch.zeros(spec.conv_width - 1, spec.width, dtype=self.dtype),
        )

    def _gate(self, x: Tensor, name: str) -> Tensor:
        return block_diagonal(x, self._weights[name], self._weights[name + "_bias"])

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return matmul(x, self._weights[name], self._weights.get(name + "_bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return rms_norm(x, self._weights[name], self.spec.norm_epsilon)


def _prompt_chunks(token_ids: Sequence[int], chunk_tokens: int) -> Iterator[StepBatch]:
    if not token_ids:
        raise RequestError("the prompt has no tokens; give at least one id")
    for start in range(0, len(token_ids), chunk_tokens):
        yield flat_batch([token_ids[start : start + chunk_tokens]], [start])
