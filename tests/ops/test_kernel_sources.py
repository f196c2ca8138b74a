"""Kernels use no code of the standard library.

They are compiled once per instruction set, and of an inline function that several objects hold the linker keeps any
one: a copy with wide instructions could come to serve a machine without them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CPU = Path(__file__).parents[2] / "csrc" / "cpu"
SOURCES = sorted([*(CPU / "kernels").iterdir(), CPU / "simd.h", CPU / "vector_math.h"])
HEADERS = {"cmath", "cstddef", "cstdint", "cstring", "immintrin.h"}
NAMES = {"byte", "memcpy", "memset", "size_t"}  # types, and functions that the compiler replaces


def faults(source: str) -> Iterator[str]:
    for header in re.findall(r"#include <(.+?)>", source):
        if header not in HEADERS:
            yield f"<{header}>"
    for name in re.findall(r"\bstd::(\w+)", source):
        if name not in NAMES:
            yield f"std::{name}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_shared_code(path: Path) -> None:
    assert list(faults(path.read_text())) == []


def test_faults_are_found() -> None:
    source = "#include <vector>\n#include <cstdint>\nstd::byte* a; int b = std::max(1, 2);"
    assert list(faults(source)) == ["<vector>", "std::max"]
