"""Compiles kernels in processes of their own: in this one Triton only interprets (tests/conftest.py)."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Result:
    name: str
    cubin: bytes
    ptx: str
    entry: dict[str, Any]
    registers: int
    faults: list[str]


def compile_largest(op: str, arch: int, **constants: int | bool) -> Result:
    """The specialisation with most of its constants switched on (a cap, a window, a norm), some of them replaced."""
    from gemma2_fast.triton_kernels import build

    largest = max(build.needed(arch, [op]), key=lambda s: sum(s.constants.values()))
    chosen = replace(largest, constants={**largest.constants, **constants})
    compiled = build.compile_for(chosen, arch)
    return Result(
        chosen.name, compiled.cubin, compiled.ptx, compiled.entry, compiled.registers, list(build.faults(compiled))
    )


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


@contextmanager
def compilers() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, initializer=_compile_for_real) as pool:
        yield pool
