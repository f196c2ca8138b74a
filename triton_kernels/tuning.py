"""Block sizes for each processor and shape: data (tuning.json), so that measuring them anew changes no code.

No card has run these kernels yet. What stands there now fits registers and shared memory of every target.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Tuned:
    constants: dict[str, int]
    num_warps: int
    num_stages: int


@cache
def _rows() -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = json.loads(Path(__file__).with_name("tuning.json").read_text("utf-8"))
    return rows


def tuned(op: str, arch: int, **shape: int) -> Tuned:
    """Of the first row for this processor and shape, which may name constants. ValueError where there is none."""
    for row in _rows().get(op, []):
        known = {**row, **row["constants"]}
        if arch in row["archs"] and all(known[key] == value for key, value in shape.items()):
            return Tuned(dict(row["constants"]), row["num_warps"], row["num_stages"])
    raise ValueError(f"tuning.json has no {op} for sm_{arch} and {shape}")
