"""The machine's ceilings: read bandwidth, float32 multiply-adds, int8 multiply-adds into int32.

python -m gemma2_fast.bench.machine --threads 2
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.bench.measure import best_beside

# Reads go round a buffer larger than the caches, a piece a probe. Probes are short: they fit between interruptions.
BUFFER_BYTES = 512 << 20
PIECE_BYTES = 16 << 20
PROBE_MULTIPLY_ADDS = 20_000_000


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
    for name in ("read_bytes", "float32_operations", "int8_operations"):
        _, rate = best_beside(lambda: 0.0, getattr(ceilings, name), budget_seconds)
        rates[name] = rate / 1e9
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    print(f"{_core.processor_name()}, {arguments.threads} thread(s)")
    for instruction_set in _core.instruction_sets():
        rates = best_rates(Ceilings.of(_core.Ops(instruction_set, arguments.threads)))
        print(
            f"{instruction_set:12}  read {rates['read_bytes']:6.1f} GB/s   float32 {rates['float32_operations']:8.1f}"
            f" GFLOP/s   int8 {rates['int8_operations']:8.1f} GOP/s"
        )


if __name__ == "__main__":
    main()
