"""The ceilings of a GPU, measured in every run: how fast it reads memory, and how fast it multiplies matrices."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial

import torch

from gemma2_fast.bench.gpu.card import Card, relative_error, seconds_of
from gemma2_fast.bench.gpu.rows import MATMUL, STREAM, Limit
from gemma2_fast.bench.gpu.stream import stream
from gemma2_fast.errors import BackendError

STREAM_BYTES = 2 << 30
MATMUL_SIZE = 8192
# Int32 of a program, and its warps: the best counts, so that the ceiling flatters nothing.
STREAM_BLOCKS = ((4096, 4), (8192, 8), (16384, 8), (16384, 16))
CHECKED_ROWS = 64
LARGEST_ERROR = 1e-2


@dataclass(frozen=True)
class GpuCeilings:
    """A second: bytes read, bytes read and written by a copy, operations of a product of bfloat16 matrices."""

    stream_bytes: float
    copy_bytes: float
    matmul_operations: float

    def bytes(self, num_bytes: float) -> Limit:
        return Limit(STREAM, self.stream_bytes, num_bytes)

    def operations(self, number: float) -> Limit:
        return Limit(MATMUL, self.matmul_operations, number)

    def line(self) -> str:
        return (
            f"ceilings: stream {self.stream_bytes / 1e9:.0f} GB/s, copy {self.copy_bytes / 1e9:.0f} GB/s, "
            f"matmul {self.matmul_operations / 1e12:.0f} TFLOP/s"
        )


def measure(card: Card, stream_bytes: int = STREAM_BYTES, size: int = MATMUL_SIZE) -> GpuCeilings:
    """Of random data; medians. BackendError where a result is wrong."""
    source = card.integers(-(2**31), 2**31 - 1, stream_bytes // 4)
    ceilings = GpuCeilings(_stream_rate(card, source), _copy_rate(card, source), _matmul_rate(card, size))
    del source
    card.free_memory()
    return ceilings


def _stream_rate(card: Card, source: torch.Tensor) -> float:
    expected = _wrapped(int(source.sum(dtype=torch.int64)))
    rates = []
    for block, num_warps in STREAM_BLOCKS:
        blocks = source.view(-1, block)
        sums = card.empty(len(blocks), dtype=torch.int32)
        seconds = seconds_of(card, [partial(stream, blocks, sums, num_warps)], [sums])
        if (found := _wrapped(int(sums.sum(dtype=torch.int64)))) != expected:
            raise BackendError(f"the kernel that measures the read bandwidth summed to {found}, expected {expected}")
        rates.append(source.nbytes / statistics.median(seconds))
    return max(rates)


def _wrapped(value: int) -> int:
    return value % 2**32


def _copy_rate(card: Card, source: torch.Tensor) -> float:
    half = len(source) // 2
    target, given = source[:half].clone(), source[half : 2 * half]
    seconds = statistics.median(seconds_of(card, [lambda: target.copy_(given)], [target]))
    if not torch.equal(target, given):
        raise BackendError("the copy that measures the bandwidth is not what was copied")
    return 2 * given.nbytes / seconds


def _matmul_rate(card: Card, size: int) -> float:
    a, b = card.normal(size, size), card.normal(size, size)
    out = card.empty(size, size)
    seconds = statistics.median(seconds_of(card, [lambda: torch.mm(a, b.T, out=out)], [out]))
    error = relative_error(out[:CHECKED_ROWS], a[:CHECKED_ROWS].float() @ b.T.float())
    if not error <= LARGEST_ERROR:
        raise BackendError(f"the product that measures the matrix units is off by {error:.2g}, at most {LARGEST_ERROR}")
    return 2.0 * size**3 / seconds
