"""Chooses the next token of each row of logits, where it can tell what the sampler of csrc/runtime would choose.

Three steps: sample_scan finds the best few tokens of each block of the vocabulary, sample_weigh the sum of each block's
weights, sample_draw the row's token. What comes first is the larger logit before the cap, on ties the lower id; a key
of 64 bits holds both and sorts that way. The best few stand in the order of their ids, as draws go through them; the
edges of top_k and top_p are found by bisection, so nothing is sorted. Where tokens that are not among the best few may
count, the choice is HOST: the host has the logits and chooses.

Weights are those of the host bit for bit. Their sums, in float64, run in another order: a choice differs only where the
draw or top_p lies within the rounding of a sum, 2^-35 of the total at the very most, of the edge between two tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import triton
import triton.language as tl

from gemma2_fast.triton_kernels.dependent_launch import wait_for_predecessor
from gemma2_fast.triton_kernels.row_math import LARGEST_FLOAT, uniform_draw, weights_of
from gemma2_fast.triton_kernels.specialisation import Specialisation

BLOCK = 2048  # tokens of a block
KEEP = 16  # the best of a block
VOCABULARY_BLOCKS = (128, 256)  # powers of two: for 256,000 and 262,144 tokens, and for 262,208
HOST = tl.constexpr(-1)
NO_KEY = tl.constexpr(2**63 - 1)  # of NaN and infinity: larger than any key
LEAST_KEY = tl.constexpr(-(2**63))


@triton.jit
def _keys(logits, ids):
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which it equals
    ascending = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    keys = (ascending << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    return tl.where(logits <= LARGEST_FLOAT, keys, NO_KEY)


@triton.jit
def _logits_of(keys):
    ascending = (keys >> 32).to(tl.int32)
    return (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _ids_of(keys):
    return 0x7FFFFFFF - keys.to(tl.int32)


@triton.jit
def _block_logits(logits, row, block, vocab, BLOCK: tl.constexpr):
    ids = block * BLOCK + tl.arange(0, BLOCK)
    return tl.load(logits + row.to(tl.int64) * vocab + ids, mask=ids < vocab, other=float("-inf")), ids


@triton.jit
def _first_key(firsts, row, blocks, BLOCKS: tl.constexpr):
    index = tl.arange(0, BLOCKS)
    return tl.max(tl.load(firsts + row.to(tl.int64) * blocks + index, mask=index < blocks, other=LEAST_KEY), 0)


@triton.jit
def sample_scan_kernel(
    logits, temperature, firsts, best, vocab,
    KEEP: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """firsts[l, b] = the largest key of block b; best[l, b] = the KEEP largest in the order of their ids, if row l is
    not greedy.

    logits [L, V] float32, V = vocab; temperature [L] float32, 0: greedy; firsts [L, blocks] and best [L, blocks, KEEP]
    int64. Grid: (V / BLOCK, rounded up, L).
    """
    wait_for_predecessor(DEPENDENT)
    block, row = tl.program_id(0), tl.program_id(1)
    place = row.to(tl.int64) * tl.num_programs(0) + block
    values, ids = _block_logits(logits, row, block, vocab, BLOCK)
    keys = _keys(values, ids)
    last = tl.max(keys, 0)
    tl.store(firsts + place, last)
    if tl.load(temperature + row) != 0:
        for _ in range(1, KEEP):
            last = tl.max(tl.where(keys < last, keys, LEAST_KEY), 0)
        among = keys >= last
        slot = tl.cumsum(among.to(tl.int32), 0) - 1
        tl.store(best + place * KEEP + slot, keys, mask=among & (slot < KEEP))


@triton.jit
def sample_weigh_kernel(
    logits, temperature, top_k, firsts, sums, vocab, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """sums[l, b] = sum of the weights of block b, if the choice of row l depends on its whole weight.

    sums [L, blocks] float64; all else as sample_draw_kernel. Grid: (V / BLOCK, rounded up, L).
    """
    wait_for_predecessor(DEPENDENT)
    block, row = tl.program_id(0), tl.program_id(1)
    blocks = tl.num_programs(0)
    heat = tl.load(temperature + row)
    if (heat != 0) & (tl.load(top_k + row) >= vocab):
        largest = _logits_of(_first_key(firsts, row, blocks, BLOCKS))
        values, _ = _block_logits(logits, row, block, vocab, BLOCK)
        weights = weights_of(values, largest, heat, cap, CAPPED)
        tl.store(sums + row.to(tl.int64) * blocks + block, tl.sum(weights.to(tl.float64), 0))


@triton.jit
def _where_it_falls(weights, left, ids):
    """The first id at which the running sum of float64 weights passes `left`; the last of any weight if rounding keeps
    it from that."""
    last = tl.max(tl.where(weights > 0, ids, 0), 0)
    return tl.minimum(tl.min(tl.where(tl.cumsum(weights, 0) > left, ids, last), 0), last)


@triton.jit
def _from_whole_row(
    logits, row, largest, heat, uniform, block_sums, vocab, cap, CAPPED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """First the block, then the token in it."""
    index = tl.arange(0, block_sums.shape[0])
    left = uniform * tl.sum(block_sums, 0)
    block = _where_it_falls(block_sums, left, index)
    left -= tl.sum(tl.where(index < block, block_sums, 0.0), 0)
    values, ids = _block_logits(logits, row, block, vocab, BLOCK)
    return _where_it_falls(weights_of(values, largest, heat, cap, CAPPED).to(tl.float64), left, ids)


@triton.jit
def _edge(keys, amounts, target):
    """Of the keys, the largest from which on up the float64 amounts reach the target; less than any if none does."""
    edge = tl.full([], LEAST_KEY, tl.int64)
    for step in range(64):
        trial = edge + (tl.full([], 1, tl.int64) << (63 - step))
        edge = tl.where(tl.sum(tl.where(keys >= trial, amounts, 0.0), 0) >= target, trial, edge)
    return tl.minimum(edge, tl.max(keys, 0))  # of a target of zero


@triton.jit
def _from_the_best(
    keys, least_known, largest, heat, top_k, top_p, min_p, uniform, total, vocab, cap, CAPPED: tl.constexpr
):  # fmt: skip
    """Among what top_k, top_p and min_p keep of keys, or HOST. least_known: no key that is not here is larger."""
    weights = weights_of(_logits_of(keys), largest, heat, cap, CAPPED)
    least_weight = weights_of(_logits_of(least_known), largest, heat, cap, CAPPED)
    exact = weights.to(tl.float64)
    edge = tl.full([], LEAST_KEY, tl.int64)
    complete = least_weight == 0
    if top_k < vocab:
        edge = _edge(keys, tl.full(keys.shape, 1.0, tl.float64), top_k)
        # Also for top_p, which shares out the weight of all these.
        complete = complete | (edge >= least_known)
        total = tl.sum(tl.where(keys >= edge, exact, 0.0), 0)
    if top_p < 1:
        edge = _edge(keys, tl.where(keys >= edge, exact, 0.0), top_p.to(tl.float64) * total)
    if top_k >= vocab:
        complete = complete | (edge >= least_known) | (least_weight < min_p)
    kept = (keys >= edge) & (weights >= min_p)
    exact = tl.where(kept, exact, 0.0)
    return tl.where(complete, _where_it_falls(exact, uniform * tl.sum(exact, 0), _ids_of(keys)), HOST)


@triton.jit
def sample_draw_kernel(
    logits, temperature, top_k, top_p, min_p, seed, token_index, firsts, best, sums, out, vocab, cap,
    CAPPED: tl.constexpr, KEEP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):  # fmt: skip
    """out[l] = the next token of row l, or HOST: the host must choose, or say that there is no token to choose.

    logits [L, V] float32, before the final cap, V = vocab; CAPPED: a token's value is cap * tanh(logit / cap). The rule
    of a row, each [L]: temperature float32, 0: the token that comes first; top_k int32, from V on all tokens; top_p
    float32, from 1 on all; min_p float32, 0: all; for the draw seed int64, its bits taken as unsigned, and token_index
    int32, the number of tokens generated so far. firsts, best and sums as the steps before leave them; out [L] int32.
    BLOCKS: a power of two, at least the number of blocks.
    HOST: the row holds NaN or infinity, or nothing above minus infinity, or more than KEEP tokens of a block may count.
    Grid: (L,).
    """
    wait_for_predecessor(DEPENDENT)
    row = tl.program_id(0)
    blocks = tl.cdiv(vocab, BLOCK)
    first = _first_key(firsts, row, blocks, BLOCKS)
    largest = _logits_of(first)
    exists = (first != NO_KEY) & (largest > float("-inf"))
    token = tl.where(exists, _ids_of(first), HOST)
    heat = tl.load(temperature + row)
    if exists & (heat != 0):
        most, share, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
        uniform = uniform_draw(tl.load(seed + row), tl.load(token_index + row))
        index = tl.arange(0, BLOCKS)
        of_row = row.to(tl.int64) * blocks
        block_sums = tl.load(sums + of_row + index, mask=index < blocks, other=0.0)
        if (most >= vocab) & (share >= 1) & (least <= 0):
            token = _from_whole_row(logits, row, largest, heat, uniform, block_sums, vocab, cap, CAPPED, BLOCK)
        else:
            place = index[:, None] * KEEP + tl.arange(0, KEEP)[None, :]
            keys = tl.load(best + of_row * KEEP + place, mask=place < blocks * KEEP, other=LEAST_KEY)
            token = _from_the_best(
                tl.reshape(keys, [BLOCKS * KEEP]), tl.max(tl.min(keys, 1), 0), largest, heat, most, share, least,
                uniform, tl.sum(block_sums, 0), vocab, cap, CAPPED,
            )  # fmt: skip
    tl.store(out + row, token)


def sample(
    logits: Any, rules: Mapping[str, Any], firsts: Any, best: Any, sums: Any, out: Any, *, softcap: float | None,
    block: int = BLOCK,
) -> None:  # fmt: skip
    """logits [L, V] float32; rules: temperature, top_k, top_p, min_p, seed and token_index, each [L]; firsts [L,
    blocks] and best [L, blocks, keep] int64 and sums [L, blocks] float64, scratch; out [L] int32.

    Contiguous tensors on one device.
    """
    rows, vocab = logits.shape
    blocks, keep = best.shape[1:]
    cap, capped = (1.0, False) if softcap is None else (softcap, True)
    padded = triton.next_power_of_2(blocks)
    heat, top_k = rules["temperature"], rules["top_k"]
    sample_scan_kernel[(blocks, rows)](logits, heat, firsts, best, vocab, KEEP=keep, BLOCK=block)
    sample_weigh_kernel[(blocks, rows)](
        logits, heat, top_k, firsts, sums, vocab, cap, CAPPED=capped, BLOCK=block, BLOCKS=padded, enable_fp_fusion=False
    )
    sample_draw_kernel[(rows,)](
        logits, heat, top_k, rules["top_p"], rules["min_p"], rules["seed"], rules["token_index"], firsts, best, sums,
        out, vocab, cap, CAPPED=capped, KEEP=keep, BLOCK=block, BLOCKS=padded, num_warps=8,
        enable_fp_fusion=False,
    )  # fmt: skip


_TYPES = {
    **dict.fromkeys(("logits", "temperature", "top_p", "min_p"), "*fp32"),
    **dict.fromkeys(("top_k", "token_index", "out"), "*i32"),
    **dict.fromkeys(("seed", "firsts", "best"), "*i64"),
    **{"sums": "*fp64", "vocab": "i32", "cap": "fp32"},
}


def specialisations(arch: int) -> Iterator[Specialisation]:
    yield _specialisation("sample_scan", sample_scan_kernel, {"KEEP": KEEP, "BLOCK": BLOCK}, num_warps=4)
    for capped, blocks in itertools.product((False, True), VOCABULARY_BLOCKS):
        sizes = {"CAPPED": capped, "BLOCK": BLOCK, "BLOCKS": blocks}
        yield _specialisation("sample_weigh", sample_weigh_kernel, sizes, num_warps=4)
        yield _specialisation("sample_draw", sample_draw_kernel, {**sizes, "KEEP": KEEP}, num_warps=8)


def _specialisation(op: str, kernel: Any, constants: Mapping[str, int | bool], num_warps: int) -> Specialisation:
    return Specialisation(
        op=op,
        kernel=kernel,
        types={name: kind for name, kind in _TYPES.items() if name in kernel.arg_names},
        constants=constants,
        divisible=frozenset({"vocab"}),
        num_warps=num_warps,
        contracts=False,
    )
