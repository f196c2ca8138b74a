"""The programs that `make tsan` and `make sanitize` build compile with the headers as they are."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(ROOT.glob("tests/*/*_stress.cpp"))


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.stem)
def test_stress_programs_compile(program: Path) -> None:
    command = [os.environ.get("CXX", "c++"), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    done = subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_some() -> None:
    assert len(PROGRAMS) == 2
