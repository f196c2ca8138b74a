"""The GPU kernels and the whole engine on one NVIDIA GPU, each figure beside the ceiling measured in the same run.

    gemma2-fast bench gpu ops --json ops.json
    gemma2-fast bench gpu 9b --json 9b.json

Every part measures the ceilings first: how fast memory is read, and a product of 8192 x 8192 matrices in bfloat16.
ops: each kernel at shapes of Gemma 2, beside PyTorch's own. 2b, 9b, 27b: decode of the whole engine with random
weights. recurrentgemma: the 2B after a long prompt beside after a short one, and in batches. prefill: prompts of 8192
tokens. peers: our engine and PyTorch's compiled models in turn. A result is checked after it was timed, and a wrong one
is not reported. Bars that are not met fail nothing; they are told at the end.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from gemma2_fast.bench.command import add_json
from gemma2_fast.bench.gpu.rows import GpuRow, Missing, tally, text_table
from gemma2_fast.bench.record import record, write_record
from gemma2_fast.errors import BackendError, Gemma2FastError

if TYPE_CHECKING:
    from gemma2_fast.bench.gpu.card import Card
    from gemma2_fast.bench.gpu.ceilings import GpuCeilings

PARTS = ("ops", "2b", "9b", "27b", "recurrentgemma", "prefill", "peers")


def rows_of(part: str, card: Card, ceilings: GpuCeilings) -> Iterator[GpuRow | Missing]:
    """Only here is it said what a part measures, and only peers need transformers."""
    from gemma2_fast.bench.gpu import models, ops, recurrent

    match part:
        case "ops":
            yield from ops.rows(card, ceilings, ops.OpsPlan())
        case "recurrentgemma":
            yield from recurrent.rows(card, ceilings, recurrent.RecurrentPlan())
        case "prefill":
            yield from models.prefill_rows(card, ceilings, models.PrefillPlan())
        case "peers":
            from gemma2_fast.bench.gpu import peers

            yield from peers.rows(card, ceilings, peers.PeersPlan())
        case size:
            batches = (8, 32) if size == "2b" else ()
            yield from models.decode_rows(card, ceilings, models.DecodePlan(size, batches=batches))


def collect(rows: Iterable[GpuRow | Missing]) -> tuple[list[dict[str, Any]], list[Missing]]:
    """Rows as JSON has them, printed as they come, and what is missing. An error ends them, and is a fault."""
    found: list[dict[str, Any]] = []
    missing: list[Missing] = []
    try:
        for row in rows:
            if isinstance(row, Missing):
                missing.append(row)
                continue
            found.append(asdict(row))
            print(f"  {row.what}, {row.shape}: {row.microseconds:.1f} µs", flush=True)
    except (Gemma2FastError, RuntimeError) as error:
        missing.append(Missing(str(error), is_fault=True))
    return found, missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    needed = ("torch", "triton", *(("transformers",) if args.part == "peers" else ()))
    if absent := [name for name in needed if find_spec(name) is None]:
        raise BackendError(f"bench gpu {args.part} needs {', '.join(absent)}, which this Python does not have")
    import torch
    import triton

    from gemma2_fast.bench.gpu.card import Card, state
    from gemma2_fast.bench.gpu.ceilings import measure

    card = Card.find()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    before = state()
    ceilings = measure(card)
    print(f"{before.get('name', card.device)}: {ceilings.line()}", flush=True)
    rows, missing = collect(rows_of(args.part, card, ceilings))
    settings = {
        "part": args.part,
        "card": {**asdict(card), "device": str(card.device)},
        "ceilings": asdict(ceilings),
        "state": before,
        "state_after": state(),
        "not_measured": [gap.reason for gap in missing],
    }
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": str(torch.version.cuda)}
    if args.json:
        write_record(args.json, record("gpu", settings, rows, versions))
    print(text_table(rows))
    print(f"{ceilings.line()}; {tally(rows)}")
    for gap in missing:
        print(f"NOT MEASURED {gap.reason}")
    if faults := [gap.reason for gap in missing if gap.is_fault]:
        raise BackendError(f"{len(faults)} of what bench gpu {args.part} measures went wrong: {'; '.join(faults)}")
