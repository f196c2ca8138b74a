"""Our engine and PyTorch's compiled models on the same weights, in turn, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from gemma2_fast.bench.gpu.card import Card, alternate, relative_error
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.gpu.decoders import CompiledPlain, CompiledTransformers, Decoder
from gemma2_fast.bench.gpu.engine import GpuEngine, Sizes
from gemma2_fast.bench.gpu.models import UNQUANTIZED, room_for, spec_of, steps_row
from gemma2_fast.bench.gpu.ops import OUT_OF_TIME
from gemma2_fast.bench.gpu.random_weights import random_tensors
from gemma2_fast.bench.gpu.rows import GpuRow, reason
from gemma2_fast.errors import BackendError

PLAIN, TRANSFORMERS = "torch.compile of a plain model", "transformers, static cache, torch.compile"
LARGEST_ERROR = 5e-2  # of logits, between two that both round to bfloat16 in every layer
CHECKED_TOKENS = 24


@dataclass(frozen=True)
class PeersPlan:
    """seconds: after the start, no peer is compiled any more that would, by the last one, take beyond that."""

    size: str = "2b"
    contexts: tuple[int, ...] = (128, 8192)
    steps: int = 70
    rounds: int = 3
    warmup_steps: int = 6  # a changed number is compiled anew, twice at most
    seconds: float = 400.0


def rows(card: Card, ceilings: GpuCeilings, plan: PeersPlan) -> Iterator[GpuRow]:
    started, longest = time.monotonic(), 0.0
    spec = spec_of(plan.size)
    weights = random_tensors(spec, None)
    with GpuEngine(spec, weights, Sizes(max_seq_len=spec.max_positions)) as engine, torch.no_grad():
        ids = engine.random_ids(CHECKED_TOKENS)
        expected = torch.from_numpy(engine.logits(ids)[-1])
        for wanted in plan.contexts:
            context = room_for(engine, wanted, plan.steps, 1)
            make: Mapping[str, Callable[[], Decoder]] = {
                PLAIN: partial(CompiledPlain, spec, weights, context, plan.steps, card.device),
                TRANSFORMERS: partial(CompiledTransformers, spec, weights, plan.size, context, plan.steps, card.device),
            }
            engine.decode(context, plan.warmup_steps)
            peers: dict[str, Decoder] = {}
            refused: dict[str, str] = {}
            for name, build in make.items():
                begin = time.monotonic()
                if begin - started + longest > plan.seconds:
                    refused[name] = OUT_OF_TIME
                    continue
                try:
                    peers[name] = checked(build(), ids, expected, plan.warmup_steps)
                except Exception as problem:  # a peer's own fault, which is told in its row
                    refused[name] = reason(problem)
                longest = max(longest, time.monotonic() - begin)
            turns = {"": partial(engine.decode, context, plan.steps)}
            turns |= {name: partial(peer.decode, plan.steps) for name, peer in peers.items()}
            times = alternate(turns, plan.rounds)
            what, own = f"decode {plan.size} {UNQUANTIZED}, in turn", times.pop("")
            yield steps_row(
                ceilings, engine, what, UNQUANTIZED, own, context=context, steps=plan.steps,
                peers={name: median(seconds) for name, seconds in times.items()}, refused=refused,
            )  # fmt: skip
            peers.clear()
            torch.compiler.reset()
            card.free_memory()


def checked(peer: Decoder, ids: Sequence[int], expected: torch.Tensor, warmup_steps: int) -> Decoder:
    """The peer, compiled. BackendError where it does not compute what we do."""
    error = relative_error(peer.logits(ids).cpu(), expected)
    if not error <= LARGEST_ERROR:
        raise BackendError(f"its logits are {error:.2g} from ours, at most {LARGEST_ERROR}")
    peer.decode(warmup_steps)
    return peer
