"""Every op at shapes of real models, in GB/s or GOP/s and in percent of the ceiling measured beside it.

    gemma2-fast bench ops --threads 2 --model 2b --formats Q8_0,Q4_K --tokens 1,512
    gemma2-fast bench ops --all-sets --json ops.json

An op whose result is not the exact one up to rounding is not reported, and the command fails. Matrix products use all
threads; the other ops run in one and are compared with the ceiling of one.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from gemma2_fast import _core
from gemma2_fast.bench import cases, int8_cases
from gemma2_fast.bench.command import add_json, add_threads, counts, main, some_of
from gemma2_fast.bench.machine import UNITS, Ceilings
from gemma2_fast.bench.measure import best_beside
from gemma2_fast.bench.record import record, write_record
from gemma2_fast.errors import BackendError
from gemma2_fast.quant import FORMATS


@dataclass(frozen=True)
class Row:
    """rate and ceiling are in 10^9 a second."""

    instruction_set: str
    threads: int
    op: str
    shape: str
    num_bytes: float
    operations: float
    microseconds: float
    limit: str
    rate: float
    unit: str
    ceiling: float
    percent: float
    error: float
    cached: bool


class WrongResult(Exception):
    """A kernel's result is not the exact one up to rounding."""


def measure(case: cases.Case, ceilings: Ceilings, threads: int, budget_seconds: float) -> Row:
    case.run()
    actual, exact = case.results()
    error = float(np.abs(actual - exact).max() / np.abs(exact).max())
    if not error <= case.largest_error:
        raise WrongResult(f"{case.op} {case.shape}: relative error {error:.2g}, at most {case.largest_error} expected")
    seconds, ceiling = best_beside(case.run, getattr(ceilings, case.limit), budget_seconds)
    rate = case.work / seconds
    return Row(
        instruction_set=ceilings.ops.instruction_set,
        threads=threads,
        op=case.op,
        shape=case.shape,
        num_bytes=case.num_bytes,
        operations=case.operations,
        microseconds=seconds * 1e6,
        limit=case.limit,
        rate=rate / 1e9,
        unit=UNITS[case.limit],
        ceiling=ceiling / 1e9,
        percent=100 * rate / ceiling,
        error=error,
        cached=case.cached,
    )


def measured_rows(args: argparse.Namespace) -> Iterator[Row | WrongResult]:
    for instruction_set in _core.instruction_sets() if args.all_sets else [_core.choose_instruction_set("auto")]:
        alone, together = (_core.Ops(instruction_set, threads) for threads in (1, args.threads))
        ceilings = {1: Ceilings.of(alone), args.threads: Ceilings.of(together)}
        for case, threads in chosen_cases(args, alone, together):
            try:
                yield measure(case, ceilings[threads], threads, args.seconds)
            except WrongResult as wrong:
                yield wrong


def chosen_cases(args: argparse.Namespace, alone: _core.Ops, together: _core.Ops) -> Iterator[tuple[cases.Case, int]]:
    """Cases with the threads they use."""
    model, threads = args.model, args.threads
    for name, matrix, num_tokens in itertools.product(
        args.formats, args.matrices or cases.MATRICES[model], args.tokens
    ):
        stored = FORMATS[name]
        if cases.MATRICES[model][matrix][1] % stored.block_weights and not stored.last_block_may_be_short:
            continue  # such a tensor is stored in another format
        if matrix == "head" and num_tokens > cases.MOST_DECODED_TOKENS:
            continue  # only sampled tokens meet the head
        if stored.block_rows == 1 and "float32" in args.activations:
            yield cases.matmul(together, model, matrix, name, num_tokens), threads
        if name in int8_cases.FORMAT_NAMES and "int8" in args.activations:
            yield int8_cases.int8_matmul(together, model, matrix, name, num_tokens), threads
    if args.matmul_only:
        return
    for num_tokens in args.tokens:
        yield int8_cases.quantize_rows(alone, model, num_tokens), 1
        for case in cases.elementwise(alone, model, num_tokens):
            yield case, 1
    for kv_type in cases.KV_TYPES:
        for num_queries in (1, 64):
            yield cases.attention(alone, model, 4096, num_queries, kv_type), 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    matrices = list(cases.MATRICES["2b"])
    add = parser.add_argument
    add("--model", choices=list(cases.MATRICES), default="2b", help="whose shapes (default: 2b)")
    add("--formats", type=some_of(list(FORMATS), "format"), default=list(FORMATS), help="comma-separated; default: all")
    kinds = ["float32", "int8"]
    add("--activations", type=some_of(kinds, "type"), default=kinds, help="of matrix products (default: float32,int8)")
    add("--matrices", type=some_of(matrices, "matrix"), help=f"comma-separated, of {', '.join(matrices)}")
    add("--tokens", type=counts, default=[1, 512], help="comma-separated; up to 16 read cold weights (default: 1,512)")
    add("--all-sets", action="store_true", help="every instruction set, not the widest alone")
    add("--matmul-only", action="store_true")
    add("--seconds", type=float, default=1.0, help="spent on a row (default: 1)")
    add_threads(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    print(f"{_core.processor_name()}: best of runs over {args.seconds} s a row, ceilings measured in between")
    rows, refused = [], []
    for row in measured_rows(args):
        if isinstance(row, WrongResult):
            refused.append(str(row))
            print(f"REFUSED {row}", file=sys.stderr)
            continue
        rows.append(row)
        print(
            f"{row.instruction_set:12} {row.threads} thread(s)  {row.op:20} {row.shape:40} {row.microseconds:11.1f} us"
            f" {row.rate:8.1f} {row.unit:7} = {row.percent:5.1f} % of {row.ceiling:.1f}",
            flush=True,
        )
    if args.json:
        settings = {"model": args.model, "threads": args.threads, "seconds": args.seconds}
        write_record(args.json, record("ops", settings, [asdict(row) for row in rows]))
    if refused:
        raise BackendError(f"{len(refused)} ops gave wrong results and are not reported: {'; '.join(refused)}")


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
