"""The one form of every result file: what was measured, where, when, with what, at which commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import gemma2_fast
from gemma2_fast import _core
from gemma2_fast.errors import FileFormatError

FORMAT = "gemma2-fast bench 1"
KINDS = ("machine", "ops", "generate", "flat", "peers", "gpu")
FIELDS = {"format": str, "kind": str, "date": str, "machine": dict, "versions": dict, "settings": dict, "rows": list}

Row = dict[str, Any]


def record(
    kind: str, settings: Mapping[str, Any], rows: Sequence[Row], versions: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """settings: what the run was asked for, its threads among it. versions: of the engines beside ours."""
    return {
        "format": FORMAT,
        "kind": kind,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": {**own_versions(), **(versions or {})},
        "settings": dict(settings),
        "rows": list(rows),
    }


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")


def read_record(path: Path) -> dict[str, Any]:
    """FileFormatError for what write_record did not write."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FileFormatError(f"{path} is no result of this version of gemma2-fast bench: its format is not {FORMAT!r}")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(content.get(name), kind)]
    if wrong or content["kind"] not in KINDS:
        raise FileFormatError(f"{path}: missing or wrong: {', '.join(wrong) or 'kind'}; measure again")
    return content


def machine() -> dict[str, Any]:
    return {
        "processor": _core.processor_name(),
        "instruction_sets": list(_core.instruction_sets()),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def own_versions() -> dict[str, str]:
    return {"gemma2_fast": gemma2_fast.__version__, "python": platform.python_version(), "numpy": np.__version__}


def commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None outside a checkout of this project."""
    here = Path(__file__).resolve().parent
    top = _git(here, "rev-parse", "--show-toplevel")
    if not top or not _is_this_project(Path(top.strip())):
        return None
    changed = _git(here, "status", "--porcelain", "--untracked-files=no")
    head = _git(here, "rev-parse", "--short=12", "HEAD")
    return head.strip() + (" with changes" if changed else "") if head else None


def _is_this_project(top: Path) -> bool:
    try:
        declared = tomllib.loads((top / "pyproject.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(declared.get("project", {}).get("name") == "gemma2-fast")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", directory, *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
