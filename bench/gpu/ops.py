"""Every GPU kernel at shapes of Gemma 2, beside the ceiling that bounds it and PyTorch's own on the same work."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

from triton.errors import TritonError

from gemma2_fast.bench.gpu import attention, small_cases
from gemma2_fast.bench.gpu.bars import bars_of
from gemma2_fast.bench.gpu.card import REPEATS, Card, relative_error, seconds_of
from gemma2_fast.bench.gpu.cases import FORMATS, HEAD_FORMATS, LINEAR, GpuCase, geglu, matmul, matmul_tiled, matrices
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.gpu.rows import GpuRow, Missing, reason, row_of
from gemma2_fast.bench.shapes import SIZES
from gemma2_fast.errors import BackendError

MakeCase = Callable[[], GpuCase]
OUT_OF_TIME = "no time was left"


@dataclass(frozen=True)
class OpsPlan:
    """sizes: whose matrices; attention: of size and window; the rest in tokens and sequences."""

    sizes: tuple[str, ...] = ("2b", "9b", "27b")
    formats: tuple[str, ...] = tuple(FORMATS)
    attention: tuple[tuple[str, int | None], ...] = (("9b", None), ("9b", 4096), ("27b", None), ("27b", 4096))
    context: int = 8192
    batches: tuple[int, ...] = (1, 32)
    many_tokens: int = 2048
    small_size: str = "9b"
    repeats: int = REPEATS
    peer_seconds: float = 360.0  # no peer is compiled later than so long after the start


def rows(card: Card, ceilings: GpuCeilings, plan: OpsPlan) -> Iterator[GpuRow | Missing]:
    """What a kernel that gave a wrong result or failed took is not told."""
    deadline = time.monotonic() + plan.peer_seconds
    found = []
    for make in cases(card, ceilings, plan):
        try:
            row = measure(card, make(), plan.repeats, deadline)
        except (BackendError, RuntimeError, TritonError) as error:
            yield Missing(str(error), is_fault=True)
        else:
            found.append(row)
            yield row
        card.free_memory()
    for size, stored in itertools.product(plan.sizes, plan.formats):
        if (row_of_step := whole_step(found, ceilings, size, stored)) is not None:
            yield row_of_step


def cases(card: Card, ceilings: GpuCeilings, plan: OpsPlan) -> Iterator[MakeCase]:
    """Each makes its buffers when it is called, and what peers need of time comes last."""
    for size, stored in itertools.product(plan.sizes, plan.formats):
        for matrix in matrices(size):
            yield partial(matmul, card, ceilings, size, matrix, stored)
    for size, batch in itertools.product(plan.sizes, plan.batches):
        yield partial(attention.decode, card, ceilings, size, plan.context, batch)
    yield partial(geglu, card, ceilings, plan.small_size, plan.many_tokens)
    for size, stored in itertools.product(plan.sizes, plan.formats):
        for matrix in ("qkv", "output", "gate_up", "down"):
            yield partial(matmul_tiled, card, ceilings, size, matrix, stored, plan.many_tokens)
    for batch in plan.batches:
        yield partial(small_cases.rms_norm_add, card, plan.small_size, batch)
        yield partial(small_cases.rope, card, plan.small_size, batch)
        for stored in plan.formats:
            yield partial(small_cases.embed, card, plan.small_size, batch, stored)
        for rule in small_cases.RULES:
            yield partial(small_cases.sample, card, rule, batch)
    for size, window in plan.attention:
        yield partial(attention.prefill, card, ceilings, size, plan.context, window)


def measure(card: Card, case: GpuCase, repeats: int, deadline: float) -> GpuRow:
    """BackendError where the result, looked at after it was timed, is wrong."""
    seconds = seconds_of(card, case.runs, case.outs, repeats)
    error = max(relative_error(*case.results(copy)) for copy in {0, len(case.runs) - 1})
    if not error <= case.largest_error:
        raise BackendError(f"{case.what} {case.shape}: relative error {error:.2g}, at most {case.largest_error}")
    peers, refused = {}, {}
    for name, make in case.peers.items():
        if time.monotonic() > deadline:
            refused[name] = OUT_OF_TIME
            continue
        try:
            peers[name] = median(seconds_of(card, make(), (), repeats))
        except Exception as problem:  # a peer's own fault, which is told in its row
            refused[name] = reason(problem)
    return row_of(
        case.what, case.shape, seconds, limit=case.limit, error=error, peers=peers, refused=refused,
        bars=bars_of(case.bars or ""),
    )  # fmt: skip


def whole_step(found: Sequence[GpuRow], ceilings: GpuCeilings, size: str, stored: str) -> GpuRow | None:
    """All products of a decode step of one token, as many of each as the model has; None where one is missing."""
    layers = SIZES[size]["num_hidden_layers"]
    own, linear, num_bytes = 0.0, 0.0, 0.0
    for matrix in matrices(size):
        kept = HEAD_FORMATS[stored] if matrix == "head" else stored
        of_matrix = (r for r in found if r.what == f"matmul {kept}" and r.shape.startswith(f"{size} {matrix} "))
        row = next(of_matrix, None)
        if row is None or row.num_bytes is None or LINEAR not in row.peers:
            return None
        count = 1 if matrix == "head" else layers
        own += count * row.microseconds / 1e6
        linear += count * row.peers[LINEAR] / 1e6
        num_bytes += count * row.num_bytes
    limit, what, shape = ceilings.bytes(num_bytes), f"matmul {stored}", f"{size} all of a step"
    return row_of(what, shape, [own], limit=limit, peers={LINEAR: linear}, bars=bars_of(what))
