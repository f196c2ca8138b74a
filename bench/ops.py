"""Every op at shapes of real models, in GB/s or GFLOP/s and in percent of the ceiling measured beside it.

    python -m gemma2_fast.bench.ops --threads 2 --model 2b --formats Q8_0,Q4_K --tokens 1,512
    python -m gemma2_fast.bench.ops --all-sets --json ops.json

An op whose result is not the exact one up to rounding is not reported, and the program ends with status 1. Matmul uses
all threads; the other ops run in one and are compared with the ceiling of one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gemma2_fast import _core
from gemma2_fast.bench import cases
from gemma2_fast.bench.machine import Ceilings
from gemma2_fast.bench.measure import best_beside
from gemma2_fast.quant import FORMATS

# Of the largest exact value. Float32 sums over 9216 columns stay below a tenth of it; a wrong nibble is far above.
LARGEST_ERROR = 2e-5
UNITS = {"read_bytes": "GB/s", "float32_operations": "GFLOP/s"}


@dataclass(frozen=True)
class Row:
    instruction_set: str
    threads: int
    op: str
    shape: str
    microseconds: float
    rate: float
    unit: str
    ceiling: float
    percent: float


class WrongResult(Exception):
    """A kernel's result is not the exact one up to rounding."""


def measure(case: cases.Case, ceilings: Ceilings, threads: int, budget_seconds: float) -> Row:
    case.run()
    actual, exact = case.results()
    error = float(np.abs(actual - exact).max() / np.abs(exact).max())
    if not error <= LARGEST_ERROR:
        raise WrongResult(f"{case.op} {case.shape}: relative error {error:.2g}, at most {LARGEST_ERROR} expected")
    seconds, ceiling = best_beside(case.run, getattr(ceilings, case.limit), budget_seconds)
    rate = case.work / seconds
    return Row(
        instruction_set=ceilings.ops.instruction_set,
        threads=threads,
        op=case.op,
        shape=case.shape,
        microseconds=seconds * 1e6,
        rate=rate / 1e9,
        unit=UNITS[case.limit],
        ceiling=ceiling / 1e9,
        percent=100 * rate / ceiling,
    )


def measured_rows(arguments: argparse.Namespace) -> Iterator[Row | WrongResult]:
    for instruction_set in _core.instruction_sets() if arguments.all_sets else [_core.choose_instruction_set("auto")]:
        alone, together = (_core.Ops(instruction_set, threads) for threads in (1, arguments.threads))
        ceilings = {1: Ceilings.of(alone), arguments.threads: Ceilings.of(together)}
        for case, threads in chosen_cases(arguments, alone, together):
            try:
                yield measure(case, ceilings[threads], threads, arguments.seconds)
            except WrongResult as wrong:
                yield wrong


def chosen_cases(
    arguments: argparse.Namespace, alone: _core.Ops, together: _core.Ops
) -> Iterator[tuple[cases.Case, int]]:
    model, threads = arguments.model, arguments.threads
    for name in arguments.formats:
        for matrix in arguments.matrices or cases.MATRICES[model]:
            _, cols = cases.MATRICES[model][matrix]
            if cols % FORMATS[name].block_weights:
                continue  # such a tensor is stored in another format
            for num_tokens in arguments.tokens:
                if matrix == "head" and num_tokens > cases.MOST_DECODED_TOKENS:
                    continue  # only sampled tokens meet the head
                yield cases.matmul(together, model, matrix, name, num_tokens), threads
    if arguments.matmul_only:
        return
    for num_tokens in arguments.tokens:
        for case in cases.elementwise(alone, model, num_tokens):
            yield case, 1
    for kv_type in ("float32", "bfloat16"):
        for num_queries in (1, 64):
            yield cases.attention(alone, model, 4096, num_queries, kv_type), 1


def format_names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        raise argparse.ArgumentTypeError(f"unknown format {unknown[0]}: expected some of {', '.join(FORMATS)}")
    return names


def counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(cases.MATRICES), default="270m", help="whose shapes")
    parser.add_argument("--formats", type=format_names, default=list(FORMATS), help="comma-separated weight formats")
    parser.add_argument(
        "--matrices", type=lambda text: text.split(","), help="comma-separated: gate, down, output, head"
    )
    parser.add_argument("--tokens", type=counts, default=[1, 512], help="comma-separated; up to 16 read cold weights")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--all-sets", action="store_true", help="every instruction set, not the widest alone")
    parser.add_argument("--matmul-only", action="store_true")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on a row")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    print(f"{_core.processor_name()}: best of runs over {arguments.seconds} s a row, ceilings measured in between")
    rows, failures = [], 0
    for row in measured_rows(arguments):
        if isinstance(row, WrongResult):
            failures += 1
            print(f"REFUSED {row}", file=sys.stderr)
            continue
        rows.append(row)
        print(
            f"{row.instruction_set:12} {row.threads} thread(s)  {row.op:20} {row.shape:40} {row.microseconds:11.1f} us"
            f" {row.rate:8.1f} {row.unit:7} = {row.percent:5.1f} % of {row.ceiling:.1f}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
