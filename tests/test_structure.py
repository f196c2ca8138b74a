"""Imports and includes go one way. The rule lives here; docs/map.md draws it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room may use rooms further left, and its neighbours in the same stage as long as they do not use it.
PYTHON_STAGES = [
    {"errors"},
    {"spec"},
    {"engine.step_batch", "engine.cache_plan"},  # the types between engine and backends, so below both
    {"quant"},
    {"_core"},
    {"text", "weights", "triton_kernels"},
    {"reference"},
    {"engine"},
    {"generator"},
    {"bench", "cli", "server", "train", "merge"},
]
GENERATOR_FILES = {
    "generator",
    "stream",
    "sampling",
    "outputs",
    "description",
}  # one room, with the package's own names
CPP_STAGES = [{"base"}, {"spec", "quant", "weights"}, {"runtime"}, {"cpu", "cuda"}, {"bindings"}]

Arrow = tuple[str, str, str]  # room that imports, room imported, where


def stage_of(room: str, stages: list[set[str]]) -> int | None:
    return next((i for i, rooms in enumerate(stages) if room in rooms), None)


def arrows_that_point_back(arrows: list[Arrow], stages: list[set[str]]) -> list[str]:
    pairs = {(source, target) for source, target, _ in arrows}
    faults = []
    for source, target, where in arrows:
        source_stage, target_stage = stage_of(source, stages), stage_of(target, stages)
        if source_stage is None or target_stage is None:
            faults.append(f"{where}: {source} uses {target}, and one of them is no room")
        elif target_stage > source_stage:
            faults.append(f"{where}: {source} must not use {target}")
        elif target_stage == source_stage and source < target and (target, source) in pairs:
            faults.append(f"{where}: {source} and {target} use each other")
    return faults


def python_files(root: Path) -> Iterator[tuple[tuple[str, ...], Path]]:
    """Dotted names below gemma2_fast, as installed, with their files."""
    for folder, prefix in (("python/gemma2_fast", ()), ("bench", ("bench",)), ("triton_kernels", ("triton_kernels",))):
        for path in sorted((root / folder).rglob("*.py")):
            parts = (*prefix, *path.relative_to(root / folder).with_suffix("").parts)
            yield (parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_names(path: Path, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Every module or name that a file imports, absolute and dotted, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ("gemma2_fast", *package)[: len(package) + 2 - node.level]
                base = ".".join((*above, base)).rstrip(".")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def room_of(root: Path, dotted: str) -> str:
    """The room of a module or name below gemma2_fast; the names of the package itself are the generator's."""
    first, *rest = dotted.split(".")
    two = ".".join((first, *rest[:1]))
    if any(two in rooms for rooms in PYTHON_STAGES):
        return two
    package = root / "python/gemma2_fast"
    is_room = first != "" and (stage_of(first, PYTHON_STAGES) is not None or (package / first).is_dir())
    is_file = (package / f"{first}.py").is_file() and first not in GENERATOR_FILES
    return first if is_room or is_file else "generator"


def python_arrows(root: Path) -> list[Arrow]:
    arrows = []
    for parts, path in python_files(root):
        room = room_of(root, ".".join(parts))
        package = parts if path.name == "__init__.py" else parts[:-1]
        for name, line in imported_names(path, package):
            top, _, rest = name.partition(".")
            if top != "gemma2_fast":
                continue
            target = room_of(root, rest)
            if target != room:
                arrows.append((room, target, f"{path.relative_to(root)}:{line}"))
    return arrows


def misplaced_third_parties(root: Path) -> list[str]:
    """torch outside the reference, and transformers anywhere, in the package itself."""
    faults = []
    for parts, path in python_files(root):
        if parts[:1] == ("bench",):
            continue
        for name, line in imported_names(path, parts):
            top = name.partition(".")[0]
            if top == "transformers" or (top == "torch" and parts[:1] != ("reference",)):
                faults.append(f"{path.relative_to(root)}:{line}: imports {top}")
    return faults


def cpp_includes(root: Path) -> Iterator[tuple[str, str, str]]:
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix not in {".h", ".cpp", ".cu", ".cuh"}:
            continue
        where = path.relative_to(root / "csrc")
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if found := re.match(r'\s*#\s*include\s*(["<])([^">]+)', line):
                yield where.parts[0], "".join(found.groups()), f"csrc/{where}:{number}"


def cpp_arrows(root: Path) -> list[Arrow]:
    arrows = (
        (room, include[1:].partition("/")[0], at) for room, include, at in cpp_includes(root) if include[0] == '"'
    )
    return [arrow for arrow in arrows if arrow[0] != arrow[1]]


def pybind11_outside_bindings(root: Path) -> list[str]:
    return [
        f"{where}: includes {include[1:]}"
        for room, include, where in cpp_includes(root)
        if include[1:].startswith(("pybind11/", "Python.h")) and room != "bindings"
    ]


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("name", "text", "fault"),
    [
        ("spec/model.py", "from gemma2_fast.weights.load import x", "spec must not use weights"),
        ("spec/model.py", "from ..weights import load", "spec must not use weights"),
        ("errors.py", "import gemma2_fast.spec", "errors must not use spec"),
        ("engine/engine.py", "def f():\n    from gemma2_fast import Generator", "engine must not use generator"),
        ("engine/engine.py", "from gemma2_fast import cli", "engine must not use cli"),
        ("engine/cache_plan.py", "from gemma2_fast.weights import load", "engine.cache_plan must not use weights"),
        ("reference/rope.py", "import gemma2_fast.engine.engine", "reference must not use engine"),
        ("weights/gguf.py", "from gemma2_fast.nowhere.room import x", "is no room"),
        ("nowhere.py", "from gemma2_fast.errors import x", "is no room"),
    ],
)
def test_python_arrow_back_is_found(tmp_path: Path, name: str, text: str, fault: str) -> None:
    tree = write_tree(tmp_path, {f"python/gemma2_fast/{name}": text, "python/gemma2_fast/nowhere/room.py": "x = 1"})
    assert [line for line in arrows_that_point_back(python_arrows(tree), PYTHON_STAGES) if fault in line]


def test_neighbours_may_not_use_each_other(tmp_path: Path) -> None:
    one_way = {"python/gemma2_fast/text/a.py": "from gemma2_fast.weights.b import x"}
    assert not arrows_that_point_back(python_arrows(write_tree(tmp_path, one_way)), PYTHON_STAGES)
    both = {"python/gemma2_fast/weights/b.py": "from gemma2_fast.text.a import y"}
    assert arrows_that_point_back(python_arrows(write_tree(tmp_path, both)), PYTHON_STAGES)


def test_misplaced_third_party_is_found(tmp_path: Path) -> None:
    tree = write_tree(
        tmp_path,
        {
            "python/gemma2_fast/reference/rope.py": "import torch.nn",
            "python/gemma2_fast/engine/engine.py": "def f():\n    from torch import nn",
            "python/gemma2_fast/text/chat.py": "import transformers",
        },
    )
    assert misplaced_third_parties(tree) == [
        "python/gemma2_fast/engine/engine.py:2: imports torch",
        "python/gemma2_fast/text/chat.py:1: imports transformers",
    ]


def test_cpp_arrow_back_is_found(tmp_path: Path) -> None:
    tree = write_tree(
        tmp_path,
        {
            "csrc/runtime/loop.h": '#pragma once\n#include "cpu/kernels.h"\n#include "base/errors.h"\n',
            "csrc/cpu/step.cpp": "#include <pybind11/numpy.h>\n",
            "csrc/bindings/bind.cpp": '#include <pybind11/numpy.h>\n#include "cpu/kernels.h"\n',
        },
    )
    assert arrows_that_point_back(cpp_arrows(tree), CPP_STAGES) == ["csrc/runtime/loop.h:2: runtime must not use cpu"]
    assert pybind11_outside_bindings(tree) == ["csrc/cpu/step.cpp:1: includes pybind11/numpy.h"]


def test_python_imports_go_one_way() -> None:
    arrows = python_arrows(ROOT)
    assert len(arrows) >= 20  # the tree was found and read
    assert arrows_that_point_back(arrows, PYTHON_STAGES) == []


def test_torch_and_transformers_stay_out() -> None:
    assert misplaced_third_parties(ROOT) == []


def test_cpp_includes_go_one_way() -> None:
    arrows = cpp_arrows(ROOT)
    assert len(arrows) >= 10
    assert arrows_that_point_back(arrows, CPP_STAGES) == []
    assert pybind11_outside_bindings(ROOT) == []


HEAVY = ("torch", "triton", "transformers")


IMPORT = f"""
import sys, time
start = time.process_time()
import gemma2_fast
print(time.process_time() - start, [name for name in {HEAVY} if name in sys.modules])
"""


def test_import_is_light(tmp_path: Path) -> None:
    """Under 0.3 s of processor time, which a busy machine does not stretch, best of six, with bytecode, as pip leaves
    it; and without torch."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(6)]
    seconds, heavy = zip(*(run.stdout.split(maxsplit=1) for run in runs), strict=True)
    assert set(heavy) == {"[]\n"}
    assert min(map(float, seconds)) < 0.3
