"""Speed and memory against length: what a model with a bounded state is for.

    gemma2-fast bench flat recurrentgemma-2b-int8 --beside gemma-2b-int8 --json flat.json

prompt: the same number of tokens decoded after a short and after a long prompt, by two processes in turn; the prompt
itself is not timed. Each plans a cache for the model's positions, or for more where it needs more. Reported are the
median of the rounds' ratios, the bytes of the caches, and the anonymous memory of the processes at the end.
context: decode speed at a list of contexts, of MODEL and of those beside it, in turn.
series: one long generation by a small random model, with speed and memory along the way and the slope of both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from gemma2_fast import Generator, _core
from gemma2_fast.bench import traffic
from gemma2_fast.bench.command import add_json, counts, main, positive, some_of
from gemma2_fast.bench.engines import OURS, Engine, EngineSpec, wait_until_idle
from gemma2_fast.bench.generate import row_of
from gemma2_fast.bench.machine import Ceilings, best_rates
from gemma2_fast.bench.model_options import add_model_options, options_of
from gemma2_fast.bench.prepare import SIZES, write_checkpoint
from gemma2_fast.bench.record import Row, record, write_record
from gemma2_fast.bench.rounds import Sample, Turn, Work, take_turns
from gemma2_fast.description import Description

LIMIT_SECONDS = 0.05  # spent on each limit between two runs
WARM_UP = Work("decode", 16, steps=2)
PARTS = ("prompt", "context", "series")


def describe(args: argparse.Namespace, model: str, tokens: int) -> Description:
    """With a cache for as many tokens as the model's positions, or for `tokens` where these are more."""
    plain = Generator.describe(model, num_threads=args.threads, max_batch_size=1, **options_of(args))
    longest = max(tokens, plain.checkpoint.spec.max_positions)
    return Generator.describe(
        model, num_threads=args.threads, max_batch_size=1, max_seq_len=longest, **options_of(args)
    )


def engine_of(args: argparse.Namespace, description: Description) -> EngineSpec:
    settings = {
        "model": str(description.checkpoint.path),
        "threads": args.threads,
        "max_batch": 1,
        "max_context": traffic.cache_of(description).max_seq_len,
        "options": options_of(args),
    }
    return EngineSpec(OURS, OURS, settings)


def decode_row(samples: Sequence[Sample], engine: Engine, description: Description, args: argparse.Namespace) -> Row:
    """The row of one engine's runs of one work."""
    work = samples[0].work
    in_cache = traffic.cache_bytes(traffic.cache_of(description), work.context + work.steps // 2)
    step_bytes = traffic.weight_bytes(description, args.quantization) + in_cache
    row = row_of(samples, engine.peak_bytes, step_bytes, traffic.block_operations(description.checkpoint.spec))
    return {"model": description.checkpoint.path.name, **row}


def collect(
    turns: Sequence[Sequence[Turn]], engines: Sequence[Engine], rounds: int, ceilings: Ceilings
) -> list[Sample]:
    for engine in engines:
        WARM_UP.seconds(engine)
    samples = []
    for sample in take_turns(
        turns,
        rounds,
        limits=lambda: best_rates(ceilings, LIMIT_SECONDS),
        settle=lambda: wait_until_idle(engines),
    ):
        rate = sample.work.tokens / sample.seconds
        what = f"{sample.work.name:32} {Path(sample.engine).name:24}"
        print(f"  round {sample.round_index + 1}: {what} {rate:10.2f} tokens/s", flush=True)
        samples.append(sample)
    return samples


def after_prompts(args: argparse.Namespace, ceilings: Ceilings) -> Iterator[Row]:
    works = [Work("decode", context, steps=args.steps) for context in dict.fromkeys(args.prompts)]
    plans = [describe(args, args.model, work.most_tokens) for work in works]
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(engine_of(args, plan))) for plan in plans]
        names = [str(work.context) for work in works]
        turns = [list(zip(names, engines, works, strict=True))]
        samples = collect(turns, engines, args.rounds, ceilings)
    runs = [[sample for sample in samples if sample.engine == name] for name in names]
    for run, engine, plan in zip(runs, engines, plans, strict=True):
        yield {
            "part": "prompt",
            **decode_row(run, engine, plan, args),
            "speed_ratio": speed_ratio(run, runs[0]),
            "cache_bytes": traffic.cache_of(plan).num_bytes,
            "anonymous_bytes": engine.anonymous_bytes,
        }


def speed_ratio(run: Sequence[Sample], other: Sequence[Sample]) -> float:
    """How many times as fast as the other's runs of the same rounds, in the median."""
    return statistics.median(b.seconds / a.seconds for a, b in zip(run, other, strict=True))


def against_context(args: argparse.Namespace, ceilings: Ceilings) -> Iterator[Row]:
    """A model that keeps all keys stops at its positions."""
    asked = [Work("decode", context, steps=args.context_steps) for context in dict.fromkeys(args.contexts)]
    plans: dict[str, Description] = {}
    works: dict[str, list[Work]] = {}
    for model in map(str, [args.model, *args.beside]):
        spec = describe(args, model, 1).checkpoint.spec
        works[model] = [work for work in asked if spec.has_bounded_cache or work.most_tokens <= spec.max_positions]
        for work in asked:
            if work not in works[model]:
                print(f"{model}: not at context {work.context}, it ends at {spec.max_positions} tokens")
        plans[model] = describe(args, model, max((work.most_tokens for work in works[model]), default=1))
    with ExitStack() as stack:
        engines = {model: stack.enter_context(Engine(engine_of(args, plan))) for model, plan in plans.items()}
        turns = [[(model, engine, work) for model, engine in engines.items() if work in works[model]] for work in asked]
        samples = collect([turn for turn in turns if turn], list(engines.values()), args.rounds, ceilings)
    for model, possible in works.items():
        for work in possible:
            run = [sample for sample in samples if (sample.engine, sample.work) == (model, work)]
            yield {"part": "context", **decode_row(run, engines[model], plans[model], args)}


def long_generation(args: argparse.Namespace) -> Iterator[Row]:
    """A row a sample, and one of their slopes, over the samples that begin with the windows full."""
    every = max(1, args.series_tokens // args.series_samples)
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / args.series_size
        write_checkpoint(args.series_size, model)
        plan = describe(args, str(model), args.series_tokens + 2)
        rows: list[Row] = []
        with Engine(engine_of(args, plan)) as engine:
            WARM_UP.seconds(engine)
            engine.begin(1, args.series_tokens)
            for begin in range(0, args.series_tokens, every):
                steps = min(every, args.series_tokens - begin)
                seconds = engine.advance(steps)
                figures = {"tokens": begin + steps, "seconds": seconds, "tokens_per_s": steps / seconds}
                rows.append({"part": "series", "model": args.series_size, **figures})
                rows[-1]["anonymous_bytes"] = engine.anonymous_bytes
    windows = [group.window_keys for group in traffic.cache_of(plan).paged if group.window_keys is not None]
    full = max(windows, default=0)
    yield from rows
    yield {"part": "slope", "model": args.series_size, **slopes(rows, full + every)}


def slopes(rows: Sequence[Row], first_token: int) -> Row:
    """Least squares over the samples that end at `first_token` or later: the change of speed over 10,000 tokens in
    percent of the mean, and bytes a token. The tokens generated are kept, and are among these bytes.
    """
    used = [row for row in rows if row["tokens"] >= first_token]
    if len(used) < 2:
        return {"first_token": first_token, "speed_percent": None, "bytes_per_token": None}
    tokens = [row["tokens"] for row in used]
    speeds, memory = ([row[name] for row in used] for name in ("tokens_per_s", "anonymous_bytes"))
    speed_slope = statistics.linear_regression(tokens, speeds).slope
    return {
        "first_token": first_token,
        "speed_percent": 100 * 10_000 * speed_slope / statistics.mean(speeds),
        "bytes_per_token": statistics.linear_regression(tokens, memory).slope,
    }


def line_of(row: Row) -> str:
    match row["part"]:
        case "series":
            return (
                f"series  {row['tokens']:7} tokens   {row['tokens_per_s']:9.2f} tokens/s   "
                f"{row['anonymous_bytes'] / 2**20:8.2f} MiB anonymous"
            )
        case "slope" if row["speed_percent"] is None:
            return f"slope   too few samples after token {row['first_token']}"
        case "slope":
            return (
                f"slope   from token {row['first_token']}: speed {row['speed_percent']:+.2f} % in 10,000 tokens, "
                f"memory {row['bytes_per_token']:+.1f} bytes a token"
            )
    line = (
        f"{row['part']:7} {row['context']:7} {row['model']:24} {row['tokens_per_s']:9.2f} tokens/s   "
        f"{row['percent']['read_bytes']:.0f} % of the read bandwidth"
    )
    if row["part"] == "context":
        return line
    return (
        f"{line}   {row['speed_ratio']:.3f} x the first   cache {row['cache_bytes']} bytes   "
        f"{row['anonymous_bytes'] / 2**20:.2f} MiB anonymous"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("--beside", action="append", default=[], metavar="MODEL2", help="for the part context; repeatable")
    add("--parts", type=some_of(PARTS, "part"), default=list(PARTS), metavar="PART,PART", help="default: all")
    add("--prompts", type=counts, default=[2100, 30000], metavar="N,N", help="default: 2100,30000")
    add("--steps", type=positive, default=200, help="decoded after each of --prompts (default: 200)")
    add("--contexts", type=counts, default=[64, 2048, 4096, 8000], metavar="N,N", help="default: 64,2048,4096,8000")
    add("--context-steps", type=positive, default=64, help="decoded at each of --contexts (default: 64)")
    add("--rounds", type=positive, default=3, help="medians are over so many (default: 3)")
    add("--series-size", choices=list(SIZES), default="recurrentgemma-small", help="default: recurrentgemma-small")
    add("--series-tokens", type=positive, default=100_000, help="default: 100000")
    add("--series-samples", type=positive, default=50, help="default: 50")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    rows: list[Row] = []
    if {"prompt", "context"} & set(args.parts):
        ceilings = Ceilings.of(_core.Ops(args.instruction_set or "auto", args.threads))
        if "prompt" in args.parts:
            rows += after_prompts(args, ceilings)
        if "context" in args.parts:
            rows += against_context(args, ceilings)
    if "series" in args.parts:
        rows += long_generation(args)
    for row in rows:
        print(line_of(row))
    if args.json:
        settings: dict[str, Any] = {
            "model": Path(args.model).name,
            "beside": [Path(model).name for model in args.beside],
            "threads": args.threads,
            "rounds": args.rounds,
            "options": options_of(args),
        }
        write_record(args.json, record("flat", settings, rows))


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
