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


def compile_named(name: str, arch: int) -> Result:
    from gemma2_fast.triton_kernels import build

    (chosen,) = (s for s in build.needed(arch) if s.name == name)
    compiled = build.compile_for(chosen, arch)
    return Result(
        name, compiled.cubin, compiled.ptx, compiled.entry, compiled.registers, list(build.faults(compiled, True))
    )


def compile_with(op: str, arch: int, values: dict[str, int]) -> None:
    """With values of arguments known, as a launch by Triton itself compiles those that are 1."""
    from gemma2_fast.triton_kernels import build

    for chosen in build.needed(arch, [op]):
        types = {name: kind for name, kind in chosen.types.items() if name not in values}
        build.compile_for(replace(chosen, types=types, constants={**chosen.constants, **values}), arch)


def _compile_for_real() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


@contextmanager
def compilers() -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, initializer=_compile_for_real) as pool:
        yield pool
