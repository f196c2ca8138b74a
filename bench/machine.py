"""The machine's ceilings, for every instruction set and number of threads: read bandwidth, float32 multiply-adds, int8
multiply-adds into int32.

    gemma2-fast bench machine --threads 1,2 --json machine.json
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.bench.command import add_json, counts, main
from gemma2_fast.bench.measure import best_beside
from gemma2_fast.bench.record import record, write_record

# Reads go round a buffer larger than the caches, a piece a probe. Probes are short: they fit between interruptions.
# A virtual machine may share the third-level caches of a whole socket, 480 MiB on the one that this was written on.
BUFFER_BYTES = 2 << 30
PIECE_BYTES = 16 << 20
PROBE_MULTIPLY_ADDS = 20_000_000

PROBES = ("read_bytes", "float32_operations", "int8_operations")
UNITS = {"read_bytes": "GB/s", "float32_operations": "GFLOP/s", "int8_operations": "GOP/s"}


@dataclass
class Ceilings:
    """Probes of one instruction set with all threads of its Ops; each returns a rate per second."""

    ops: _core.Ops
    buffer: NDArray[np.uint8]
    next_piece: int = 0

    @staticmethod
    def of(ops: _core.Ops) -> Ceilings:
        return Ceilings(ops, np.ones(BUFFER_BYTES, dtype=np.uint8))

    def read_bytes(self) -> float:
        first = self.next_piece * PIECE_BYTES
        self.next_piece = (self.next_piece + 1) % (BUFFER_BYTES // PIECE_BYTES)
        return self.ops.read(self.buffer[first : first + PIECE_BYTES]) / self.ops.kernel_seconds

    def float32_operations(self) -> float:
        """A multiply-add counts as two."""
        return 2 * self.ops.multiply_add(PROBE_MULTIPLY_ADDS) / self.ops.kernel_seconds

    def int8_operations(self) -> float:
        return 2 * self.ops.multiply_add_bytes(4 * PROBE_MULTIPLY_ADDS) / self.ops.kernel_seconds


def best_rates(ceilings: Ceilings, budget_seconds: float = 1.0) -> dict[str, float]:
    """The best of each probe, in 10^9 a second."""
    rates = {}
    for name in PROBES:
        _, rate = best_beside(lambda: 0.0, getattr(ceilings, name), budget_seconds)
        rates[name] = rate / 1e9
    return rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cpus = len(os.sched_getaffinity(0))
    default = sorted({1, cpus})
    parser.add_argument(
        "--threads", type=counts, default=default, metavar="N,N", help=f"default: {','.join(map(str, default))}"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on a probe (default: 1)")
    add_json(parser)


def run(args: argparse.Namespace) -> None:
    print(_core.processor_name())
    rows: list[dict[str, Any]] = []
    for instruction_set in _core.instruction_sets():
        for threads in args.threads:
            rates = best_rates(Ceilings.of(_core.Ops(instruction_set, threads)), args.seconds)
            rows.append({"instruction_set": instruction_set, "threads": threads, **rates})
            figures = "   ".join(f"{name} {rates[name]:8.1f} {UNITS[name]}" for name in PROBES)
            print(f"{instruction_set:12} {threads} thread(s)   {figures}", flush=True)
    if args.json:
        write_record(args.json, record("machine", {"threads": args.threads, "seconds": args.seconds}, rows))


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
