"""The GPU that is measured: what it is, how work on it is timed, and random numbers that lie there."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from gemma2_fast.errors import BackendError

LEAST_PASS_SECONDS = 2e-3  # beside which the microseconds that starting a graph takes are nothing
REPEATS = 25
QUERIES = ("name", "driver_version", "pstate", "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")

Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Card:
    """device: a CUDA device; tests put the CPU in its place."""

    device: torch.device
    arch: int  # compute capability, 90 for 9.0
    num_processors: int
    l2_bytes: int

    @staticmethod
    def find() -> Card:
        if not torch.cuda.is_available():
            raise BackendError(
                f"bench gpu measures a CUDA GPU, and torch {torch.__version__} finds none here; run it on a machine "
                "with an NVIDIA GPU, its driver, and a torch that is built for CUDA"
            )
        found = torch.cuda.get_device_properties(0)
        arch = 10 * found.major + found.minor
        return Card(torch.device("cuda", 0), arch, found.multi_processor_count, found.L2_cache_size)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def copies(self, num_bytes: int) -> int:
        """Of buffers of so many bytes: between two uses of one, more than twice the second-level cache is touched."""
        return math.ceil(2 * self.l2_bytes / num_bytes) + 1

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, deviation: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype).mul_(deviation)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, device=self.device, dtype=dtype)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, device=self.device, dtype=dtype)

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def free_memory(self) -> None:
        """Back to the driver, whose free memory the engine plans with."""
        if self.is_gpu:
            torch.cuda.empty_cache()


def seconds_of(
    card: Card, runs: Sequence[Run], outs: Sequence[torch.Tensor] = (), repeats: int = REPEATS
) -> list[float]:
    """Of one run, `repeats` times: each the mean over a pass through all of `runs`, which have buffers of their own.

    A pass is a CUDA graph, so that launches follow one another as in a decode step. outs are filled with what no run
    leaves, once everything is compiled and before anything is timed.
    """
    for run in runs:
        run()
    card.wait()
    for out in outs:
        out.fill_(math.nan if out.is_floating_point() else -7)
    if not card.is_gpu:
        return [_host_seconds(runs) for _ in range(repeats)]
    once = statistics.median(_replays(_graph(runs), 3)) / len(runs)
    wanted = math.ceil(LEAST_PASS_SECONDS / (once * len(runs)))
    chain = list(runs) * max(1, wanted)
    return [seconds / len(chain) for seconds in _replays(_graph(chain), repeats)]


def _host_seconds(runs: Sequence[Run]) -> float:
    start = time.perf_counter()
    for run in runs:
        run()
    return (time.perf_counter() - start) / len(runs)


def _graph(runs: Sequence[Run]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return graph


def _replays(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Seconds of each replay; all are queued before the first is awaited."""
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]  # type: ignore[no-untyped-call]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) / 1000 for first, second in itertools.pairwise(marks)]


def alternate(turns: Mapping[Name, Callable[[], list[float]]], rounds: int) -> dict[Name, list[float]]:
    """What all turns of each name gave. Each round begins with another one."""
    names = list(turns)
    times: dict[Name, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            times[name] += turns[name]()
    return times


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Of the whole, by the lengths of the vectors; NaN where there is one."""
    difference = actual.double() - exact.double()
    return float(difference.norm() / exact.double().norm())


def state() -> dict[str, Any]:
    """Driver, clocks and temperature as nvidia-smi tells them now; empty where it is not there."""
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return {}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return dict(zip(QUERIES, values, strict=True)) if done.returncode == 0 and len(values) == len(QUERIES) else {}
