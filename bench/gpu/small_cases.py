"""The kernels of a step that move little: their time is what counts, in microseconds."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gemma2_fast.bench import shapes
from gemma2_fast.bench.gpu.attention import Heads
from gemma2_fast.bench.gpu.card import Card
from gemma2_fast.bench.gpu.cases import GpuCase, random_weights
from gemma2_fast.triton_kernels import embed as embed_kernel
from gemma2_fast.triton_kernels import rms_norm as norm_kernel
from gemma2_fast.triton_kernels import rope as rope_kernel
from gemma2_fast.triton_kernels import sample as sample_kernel
from gemma2_fast.triton_kernels.attention_common import PAGE_TOKENS

EPSILON = 1e-6
NORM_WARPS = 8  # from 4096 columns on, as rms_norm.specialisations has it
FINAL_CAP = 30.0
# Temperature, top_k (as many as there are where it is None) and top_p.
RULES: dict[str, tuple[float, int | None, float]] = {
    "greedy": (0.0, None, 1.0),
    "top_k 40, top_p 0.95": (1.0, 40, 0.95),
}


def rms_norm_add(card: Card, size: str, tokens: int) -> GpuCase:
    """Both norms and the residual. The residual grows from run to run, so that the check makes one of its own."""
    width = shapes.SIZES[size]["hidden_size"]
    copies = card.copies(tokens * width * 12)
    branch, outs = card.normal(copies, tokens, width), card.empty(copies, tokens, width)
    residual = card.normal(copies, tokens, width, dtype=torch.float32)
    after, before = (card.normal(copies, width, dtype=torch.float32, deviation=0.1) for _ in range(2))
    warps = NORM_WARPS if width > 2048 else 4

    runs = [
        partial(norm_kernel.rms_norm_add, given, gain, total, next_gain, EPSILON, out, num_warps=warps)
        for given, gain, total, next_gain, out in zip(branch, after, residual, before, outs, strict=True)
    ]

    def results(copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        total = residual[copy] + _normed(branch[copy].float(), after[copy])
        runs[copy]()
        actual = torch.cat([residual[copy], outs[copy].float()])
        return actual, torch.cat([total, _normed(total, before[copy])])

    return GpuCase("rms_norm_add", f"{size} [{tokens}, {width}]", runs, list(outs), results)


def _normed(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * (1 + gain)


def rope(card: Card, size: str, tokens: int) -> GpuCase:
    """Of as many sequences as tokens. Queries turn further from run to run, so that the check makes one of its own."""
    heads = Heads.of(size)
    both = heads.query_heads + 2 * heads.kv_heads
    copies = card.copies(tokens * both * heads.head_dim * 2)
    qkv = card.normal(copies, tokens, both, heads.head_dim)
    pages = card.empty(copies, tokens, 2, heads.kv_heads, PAGE_TOKENS, heads.head_dim)
    positions = card.integers(0, PAGE_TOKENS, tokens)
    sequences = torch.arange(tokens, device=card.device, dtype=torch.int32)
    angles = card.normal(PAGE_TOKENS, heads.head_dim // 2, dtype=torch.float32)
    cos, sin = angles.cos(), angles.sin()

    runs = [
        partial(rope_kernel.rope, given, positions, sequences, cos, sin, stored, sequences[:, None])
        for given, stored in zip(qkv, pages, strict=True)
    ]

    def results(copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = qkv[copy].float().clone()
        runs[copy]()
        turned = _turned(given[:, : -heads.kv_heads], cos[positions.long()], sin[positions.long()])
        stored = pages[copy][sequences.long(), :, :, positions.long()].flatten(1, 2)
        actual = torch.cat([qkv[copy][:, : heads.query_heads], stored], dim=1)
        return actual, torch.cat([turned, given[:, -heads.kv_heads :]], dim=1)

    return GpuCase("rope", f"{size} [{tokens}, {both}, {heads.head_dim}]", runs, list(pages), results)


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def embed(card: Card, size: str, tokens: int, stored: str) -> GpuCase:
    """Each run has other tokens of one table."""
    width, vocab = shapes.SIZES[size]["hidden_size"], shapes.SIZES[size]["vocab_size"]
    weights = random_weights(card, stored, vocab, width)
    table, *others = next(weights.arrays())
    copies = card.copies(tokens * width * 6)
    outs, ids = card.empty(copies, tokens, width, dtype=torch.float32), card.integers(0, vocab, copies, tokens)
    scale = width**0.5
    return GpuCase(
        f"embed {stored}",
        f"{size} [{tokens}, {width}]",
        [partial(embed_kernel.embed, some, table, scale, out, *others) for some, out in zip(ids, outs, strict=True)],
        list(outs),
        lambda copy: (outs[copy], weights.exact(0, ids[copy].long()) * scale),
    )


def sample(card: Card, rule: str, rows: int) -> GpuCase:
    """The three launches that choose a token of each row."""
    temperature, top_k, top_p = RULES[rule]
    vocab = shapes.VOCAB_SIZE
    copies = card.copies(rows * vocab * 4)
    logits = card.normal(copies, rows, vocab, dtype=torch.float32, deviation=8.0)
    blocks = -(-vocab // sample_kernel.BLOCK)
    outs = card.empty(copies, rows, dtype=torch.int32)
    rules = {
        "temperature": _filled(card, rows, temperature, torch.float32),
        "top_k": _filled(card, rows, top_k or vocab, torch.int32),
        "top_p": _filled(card, rows, top_p, torch.float32),
        "min_p": _filled(card, rows, 0.0, torch.float32),
        "seed": torch.arange(rows, device=card.device, dtype=torch.int64),
        "token_index": _filled(card, rows, 3, torch.int32),
    }
    scratch = (
        card.empty(rows, blocks, dtype=torch.int64),
        card.empty(rows, blocks, sample_kernel.KEEP, dtype=torch.int64),
        torch.zeros(rows, blocks, dtype=torch.float64, device=card.device),  # read also where none is written
    )

    def results(copy: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ones where the token is among those that the rule allows; with one allowed it is the token itself."""
        least = logits[copy].topk(top_k or 1).values[:, -1]
        inside = (outs[copy] >= 0) & (outs[copy] < vocab)
        chosen = logits[copy].gather(1, outs[copy].long().clamp(0, vocab - 1)[:, None])[:, 0]
        allowed = inside & (chosen >= least)
        return allowed.float(), torch.ones_like(least)

    runs = [
        partial(sample_kernel.sample, given, rules, *scratch, out, softcap=FINAL_CAP)
        for given, out in zip(logits, outs, strict=True)
    ]
    return GpuCase("sample", f"{rule} [{rows}, {vocab}]", runs, list(outs), results)


def _filled(card: Card, rows: int, value: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((rows,), value, device=card.device, dtype=dtype)
