"""A whole model through the public Generator: prefill, time to the first token, decode at long contexts and in batches,
peak memory, each beside the machine's limits of the same moment.

    gemma2-fast bench generate gemma-3-270m --threads 2
    gemma2-fast bench generate DIRECTORY --quantization int8 --kv-dtype int8 --json int8.json

Two processes load the model in turn, one for single sequences and one for batches, so that each one's peak memory is
its own. Decode reads all weights and the keys and values once a step: its rate is compared with the read bandwidth.
Prefill is counted over the block matrices and compared with both arithmetic peaks.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma2_fast import _core
from gemma2_fast.bench import traffic
from gemma2_fast.bench.command import add_json, counts, main, positive
from gemma2_fast.bench.engines import Engine, EngineSpec, wait_until_idle
from gemma2_fast.bench.machine import Ceilings, best_rates
from gemma2_fast.bench.model_options import add_model_options, describe, options_of, our_engine
from gemma2_fast.bench.record import Row, record, write_record
from gemma2_fast.bench.rounds import Sample, Work, alternate, longest

LIMIT_SECONDS = 0.05  # spent on each limit between two runs
BATCH_CONTEXT = 16


def single_works(prefills: Sequence[int], contexts: Sequence[int], steps: int, max_positions: int) -> list[Work]:
    """A prompt leaves room for what is generated after it; context 0 is a prompt of one token."""
    works = [Work("prefill", min(tokens, max_positions - 1)) for tokens in prefills]
    return works + [
        Work("decode", min(max(context, 1), max_positions - steps - 1), steps=steps) for context in contexts
    ]


def batch_works(batches: Sequence[int], steps: int) -> list[Work]:
    return [Work("decode", BATCH_CONTEXT, batch, steps) for batch in batches]


def measure(spec: EngineSpec, works: Sequence[Work], rounds: int, ceilings: Ceilings) -> tuple[list[Sample], Engine]:
    """The samples, and the engine, closed, with its peak memory."""
    with Engine(spec) as engine:
        engine.prefill(BATCH_CONTEXT)
        engine.decode(1, BATCH_CONTEXT, 2)
        samples = []
        for sample in alternate(
            {spec.label: engine},
            works,
            rounds,
            limits=lambda: best_rates(ceilings, LIMIT_SECONDS),
            settle=lambda: wait_until_idle([engine]),
        ):
            rate = sample.work.tokens / sample.seconds
            print(f"  round {sample.round_index + 1}: {sample.work.name:32} {rate:10.2f} tokens/s", flush=True)
            samples.append(sample)
    return samples, engine


def row_of(samples: Sequence[Sample], peak_bytes: int, step_bytes: float, token_operations: float) -> Row:
    """Medians over the rounds of one work. step_bytes: read by a decode step; token_operations: of a prompt's token."""
    work = samples[0].work
    median_s = statistics.median(sample.seconds for sample in samples)
    row: Row = {
        "work": work.kind,
        "context": work.context,
        "batch": work.batch,
        "steps": work.steps,
        "seconds": [sample.seconds for sample in samples],
        "tokens_per_s": work.tokens / median_s,
        "peak_bytes": peak_bytes,
        "limits": {name: statistics.median(s.limits[name] for s in samples) for name in samples[0].limits},
    }
    if work.kind == "prefill":
        rates = [work.tokens * token_operations / sample.seconds / 1e9 for sample in samples]
        row |= {
            "first_token_s": median_s,
            "operations_per_token": token_operations,
            "gop_per_s": statistics.median(rates),
        }
        compared = ["int8_operations", "float32_operations"]
    else:
        rates = [work.steps * step_bytes / sample.seconds / 1e9 for sample in samples]
        row |= {"step_s": median_s / work.steps, "bytes_per_step": step_bytes, "gb_per_s": statistics.median(rates)}
        compared = ["read_bytes"]
    row["percent"] = {
        name: statistics.median(100 * rate / s.limits[name] for rate, s in zip(rates, samples, strict=True))
        for name in compared
    }
    return row


def line_of(row: Row) -> str:
    percent = row["percent"]
    if row["work"] == "prefill":
        return (
            f"prefill {row['context']:5}            {row['tokens_per_s']:9.1f} tokens/s   first token "
            f"{row['first_token_s']:7.3f} s   {row['gop_per_s']:7.0f} GOP/s = {percent['int8_operations']:.0f} % of "
            f"the int8 peak, {percent['float32_operations']:.0f} % of the float32 peak"
        )
    return (
        f"decode {row['context']:6}, batch {row['batch']:2}  {row['tokens_per_s']:9.2f} tokens/s   step "
        f"{1000 * row['step_s']:13.1f} ms   {row['gb_per_s']:6.1f} GB/s = {percent['read_bytes']:.0f} % of the read "
        f"bandwidth ({row['bytes_per_step'] / 1e9:.3f} GB a step)"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("--prefill", type=counts, default=[128, 512, 2048, 8192], metavar="N,N", help="default: 128,512,2048,8192")
    add("--contexts", type=contexts, default=[0, 2048, 8192], metavar="N,N", help="default: 0,2048,8192")
    add("--batches", type=counts, default=[1, 2, 4, 8, 16], metavar="N,N", help="default: 1,2,4,8,16")
    add("--steps", type=positive, default=32, help="decoded tokens of each sequence (default: 32)")
    add("--rounds", type=positive, default=3, help="medians are over so many (default: 3)")
    add_json(parser)


def contexts(text: str) -> list[int]:
    return [0 if part == "0" else positive(part) for part in text.split(",")]


def run(args: argparse.Namespace) -> None:
    description = describe(args)
    cache, spec = traffic.cache_of(description), description.checkpoint.spec
    weights = traffic.weight_bytes(description, args.quantization)
    operations = traffic.block_operations(spec)
    ceilings = Ceilings.of(_core.Ops(args.instruction_set or "auto", args.threads))
    print(f"{args.model}, {args.threads} threads, {weights / 1e9:.3f} GB of weights, KV {cache.kv_dtype}")

    singles = single_works(args.prefill, args.contexts, args.steps, spec.max_positions)
    batches = batch_works(args.batches, args.steps)
    rows: list[Row] = []
    versions: dict[str, str] = {}
    load_s: dict[str, float] = {}
    for phase, works, max_batch in (("singles", singles, 1), ("batches", batches, max(args.batches))):
        engine_spec = our_engine(args, max_batch, longest(works, spec.max_positions))
        samples, engine = measure(engine_spec, works, args.rounds, ceilings)
        versions, load_s[phase] = engine.versions, engine.load_s
        for work in dict.fromkeys(works):
            # The steps' mean context, each sequence its own keys.
            context = work.context + work.steps / 2
            step_bytes = weights + work.batch * traffic.cache_bytes(cache, int(context))
            rows.append(row_of([s for s in samples if s.work == work], engine.peak_bytes, step_bytes, operations))
    for row in rows:
        print(line_of(row))
    for phase, index in (("single sequences", 0), (f"batches of up to {max(args.batches)}", -1)):
        print(f"peak memory with {phase}: {rows[index]['peak_bytes'] / 2**30:.2f} GiB")
    if args.json:
        settings: dict[str, Any] = {
            "model": Path(args.model).name,
            "threads": args.threads,
            "rounds": args.rounds,
            "options": options_of(args),
            "kv_dtype": cache.kv_dtype,
            "weight_bytes": weights,
            "load_s": load_s,
        }
        write_record(args.json, record("generate", settings, rows, versions))


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
