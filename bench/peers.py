"""Our engine and its peers on the same work, in turn, in one run.

    gemma2-fast bench peers MODEL --quantization int8 --peer llama_cpp=2b-q8_0.gguf \\
        --peer openvino=2b-int8,DYNAMIC_QUANTIZATION_GROUP_SIZE=128 --peer-python openvino=.venv/peers/bin/python
    gemma2-fast bench peers --prepare DIRECTORY --size 2b --peer-python openvino=.venv/peers/bin/python
    gemma2-fast bench peers --prepare DIRECTORY --size 27b --quantization int4

Every engine is a process of its own with its model loaded once; while one computes, the others sleep, which is checked.
A round gives each work to each engine, and the machine's limits are measured before and after every run. Reported are
medians over the rounds, and the median of the rounds' ratios. A peer that runs our very file must agree with us on the
likeliest tokens before it is timed. Among a peer's options, env.NAME=VALUE sets a variable of its environment.
How peers are installed and their models made: bench/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from gemma2_fast import _core
from gemma2_fast.bench import traffic
from gemma2_fast.bench.command import add_json, counts, key_values, main, positive
from gemma2_fast.bench.engines import OURS, PEERS, Engine, EngineSpec, wait_until_idle
from gemma2_fast.bench.machine import Ceilings, best_rates
from gemma2_fast.bench.model_options import add_model_options, describe, model_path, options_of, our_engine
from gemma2_fast.bench.prepare import SIZES, prepare
from gemma2_fast.bench.record import Row, record, write_record
from gemma2_fast.bench.rounds import Sample, Work, alternate, longest
from gemma2_fast.errors import BackendError, RequestError
from gemma2_fast.weights.load import load_checkpoint

LIMIT_SECONDS = 0.05  # spent on each limit between two runs
# Prompts whose likeliest next tokens must agree; logits this near to each other count as a tie.
CHECKED_TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it"
)
CHECKED_PREFIXES = 6
TIE = 0.5
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def parse_peer(text: str) -> tuple[str, str, dict[str, str]]:
    """KIND=MODEL[,KEY=VALUE…]"""
    kind, _, rest = text.partition("=")
    model, *options = rest.split(",")
    if kind not in PEERS or not model:
        raise argparse.ArgumentTypeError(f"expected KIND=MODEL with a KIND of {', '.join(PEERS)}, got {text!r}")
    return kind, model, key_values(options)


def parse_python(text: str) -> tuple[str, str]:
    ((kind, python),) = key_values([text]).items()
    if kind not in PEERS:
        raise argparse.ArgumentTypeError(f"expected KIND=PYTHON with a KIND of {', '.join(PEERS)}, got {text!r}")
    return kind, python


def peer_engines(args: argparse.Namespace, max_batch: int, max_context: int) -> list[EngineSpec]:
    pythons = {"": sys.executable, **dict(args.peer_python)}
    specs: list[EngineSpec] = []
    for kind, model, options in args.peer:
        environment = {key[4:]: value for key, value in options.items() if key.startswith("env.")}
        settings = {
            "model": model_path(model),
            "threads": args.threads,
            "max_batch": max_batch,
            "max_context": max_context,
            "options": {key: value for key, value in options.items() if not key.startswith("env.")},
        }
        label = ",".join([kind, *(f"{key}={value}" for key, value in options.items())])
        if label in {spec.label for spec in specs}:
            label += f" {Path(model).name}"
        specs.append(EngineSpec(label, kind, settings, pythons.get(kind, sys.executable), environment))
    return specs


def check_equal(ours: Engine, peer: Engine) -> str:
    """What was compared; BackendError when the likeliest next tokens differ by more than a tie."""
    if peer.spec.settings["model"] != model_path(str(ours.spec.settings["model"])):
        return "not compared: other weights"
    ids = ours.encode(CHECKED_TEXT)
    lengths = [len(ids) * (part + 1) // CHECKED_PREFIXES for part in range(CHECKED_PREFIXES)]
    for length in lengths:
        mine, theirs = ours.likeliest(ids[:length]), peer.likeliest(ids[:length])
        if not agree(mine, theirs):
            raise BackendError(
                f"{peer.spec.label} is not timed: after {length} tokens of the same file its likeliest are {theirs}, "
                f"ours {mine}"
            )
    return f"the likeliest tokens after {CHECKED_PREFIXES} prompts are the same"


def agree(mine: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]]) -> bool:
    """The same first token, or each one's first a near second of the other."""

    def near(first: int, others: Sequence[tuple[int, float]]) -> bool:
        return dict(others).get(first, float("-inf")) >= others[0][1] - TIE

    return mine[0][0] == theirs[0][0] or (near(mine[0][0], theirs) and near(theirs[0][0], mine))


def model_bytes(spec: EngineSpec) -> int:
    """Of a peer's weights: what its decode step reads. They are in memory as on disk, but for a dtype asked for."""
    path = Path(str(spec.settings["model"]))
    dtype = spec.settings.get("options", {}).get("dtype")
    if dtype in ELEMENT_BYTES:
        return load_checkpoint(path).num_parameters * ELEMENT_BYTES[dtype]
    names = {
        "openvino": "openvino_model.bin",
        "ctranslate2": "model.bin",
        "transformers": "*.safetensors",
        "recurrentgemma": "*.safetensors",
    }
    files = [path] if path.is_file() else sorted(path.glob(names.get(spec.kind, "*")))
    return sum(file.stat().st_size for file in files)


def rows_of(samples: Sequence[Sample], step_bytes: dict[str, float], token_operations: float) -> list[Row]:
    """A row for each work and engine, ours first; ratio: ours to theirs in speed, the median of the rounds' ratios."""
    rows = []
    for work in dict.fromkeys(sample.work for sample in samples):
        runs: dict[str, list[Sample]] = {}
        for sample in samples:
            if sample.work == work:
                runs.setdefault(sample.engine, []).append(sample)
        ours = runs[OURS]
        for engine in sorted(runs, key=lambda name: name != OURS):
            found = runs[engine]
            limit = "int8_operations" if work.kind == "prefill" else "read_bytes"
            units = work.tokens * token_operations if work.kind == "prefill" else work.steps * step_bytes[engine]
            rows.append(
                {
                    "work": work.kind,
                    "context": work.context,
                    "batch": work.batch,
                    "steps": work.steps,
                    "engine": engine,
                    "seconds": [sample.seconds for sample in found],
                    "tokens_per_s": statistics.median(work.tokens / sample.seconds for sample in found),
                    "ratio": statistics.median(b.seconds / a.seconds for a, b in zip(ours, found, strict=True)),
                    "percent": {
                        limit: statistics.median(units / s.seconds / 1e7 / s.limits[limit] for s in found),
                    },
                    "limits": {
                        name: statistics.median(sample.limits[name] for sample in found) for name in found[0].limits
                    },
                }
            )
    return rows


def print_rows(rows: Sequence[Row]) -> None:
    width = max(len(row["engine"]) for row in rows)
    for _, group in itertools.groupby(rows, key=lambda row: (row["work"], row["context"], row["batch"])):
        for index, row in enumerate(group):
            if index == 0:
                limits = row["limits"]
                name = Work(row["work"], row["context"], row["batch"]).name
                print(
                    f"{name}   (limits: {limits['read_bytes']:.1f} GB/s, {limits['int8_operations']:.0f} int8 GOP/s, "
                    f"{limits['float32_operations']:.0f} GFLOP/s)"
                )
            ((limit, percent),) = row["percent"].items()
            what = "of the int8 peak" if limit == "int8_operations" else "of the read bandwidth"
            ratio = "" if row["engine"] == OURS else f"   ours is {row['ratio']:.2f} x"
            print(f"  {row['engine']:{width}} {row['tokens_per_s']:9.2f} tokens/s  {percent:4.0f} % {what}{ratio}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    for action in parser._actions:
        if action.dest == "model":
            action.nargs = "?"
    add = parser.add_argument
    add("--peer", type=parse_peer, action="append", default=[], metavar="KIND=MODEL[,KEY=VALUE…]", help="repeatable")
    add("--peer-python", type=parse_python, action="append", default=[], metavar="KIND=PYTHON", help="repeatable")
    add("--prompt", type=positive, default=512, help="tokens of the prefill (default: 512)")
    add("--context", type=positive, default=64, help="prompt before decoding (default: 64)")
    add("--batches", type=counts, default=[1, 8], metavar="N,N", help="default: 1,8")
    add("--steps", type=positive, default=32, help="decoded tokens of each sequence (default: 32)")
    add("--rounds", type=positive, default=5, help="default: 5")
    add("--prepare", type=Path, metavar="DIRECTORY", help="make random models there, and stop")
    add("--size", choices=list(SIZES), default="2b", help="of what --prepare makes (default: 2b)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    if args.prepare is not None:
        prepare(args.prepare, args.size, dict(args.peer_python), args.quantization)
        return
    if args.model is None or not args.peer:
        raise RequestError("give our MODEL and at least one --peer KIND=MODEL, or --prepare DIRECTORY")
    description = describe(args)
    cache, spec = traffic.cache_of(description), description.checkpoint.spec
    works = [Work("prefill", args.prompt)]
    works += [Work("decode", args.context, batch, args.steps) for batch in args.batches]
    max_batch, max_context = max(args.batches), longest(works, spec.max_positions)
    specs = [our_engine(args, max_batch, max_context), *peer_engines(args, max_batch, max_context)]
    ceilings = Ceilings.of(_core.Ops(args.instruction_set or "auto", args.threads))

    with ExitStack() as stack:
        engines = {engine_spec.label: stack.enter_context(Engine(engine_spec)) for engine_spec in specs}
        checks = {label: check_equal(engines[OURS], engine) for label, engine in engines.items() if label != OURS}
        for label, check in checks.items():
            print(f"{label}: {check}")
        samples = collect(engines, works, args.rounds, lambda: best_rates(ceilings, LIMIT_SECONDS))
    step_bytes = {label: float(model_bytes(engine.spec)) for label, engine in engines.items()}
    step_bytes[OURS] = traffic.weight_bytes(description, args.quantization) + traffic.cache_bytes(cache, args.context)
    rows = rows_of(samples, step_bytes, traffic.block_operations(spec))
    print_rows(rows)
    if args.json:
        settings = {
            "model": Path(args.model).name,
            "threads": args.threads,
            "rounds": args.rounds,
            "options": options_of(args),
            "engines": {
                label: {
                    "kind": engine.spec.kind,
                    "model": Path(str(engine.spec.settings["model"])).name,
                    "options": engine.spec.settings["options"],
                    "environment": dict(engine.spec.environment),
                    "load_s": engine.load_s,
                    "peak_bytes": engine.peak_bytes,
                    "bytes_per_step": step_bytes[label],
                    "check": checks.get(label),
                }
                for label, engine in engines.items()
            },
        }
        versions = {name: version for engine in engines.values() for name, version in engine.versions.items()}
        write_record(args.json, record("peers", settings, rows, versions))


def collect(
    engines: dict[str, Engine], works: Sequence[Work], rounds: int, limits: Callable[[], dict[str, float]]
) -> list[Sample]:
    """Samples of all rounds; what comes before them, once each, warms caches and compiles what engines compile late."""
    idle = list(engines.values())
    for engine in idle:
        for work in works:
            work.seconds(engine)
            wait_until_idle(idle)
    samples = []
    turns = alternate(dict(engines), works, rounds, limits=limits, settle=lambda: wait_until_idle(idle))
    for sample in turns:
        rate = sample.work.tokens / sample.seconds
        what = f"{sample.work.name:32} {sample.engine:40}"
        print(f"  round {sample.round_index + 1}: {what} {rate:10.2f} tokens/s", flush=True)
        samples.append(sample)
    return samples


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
