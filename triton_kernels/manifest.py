"""manifest.json beside compiled kernels: written by build.py, read where they are launched. Needs no Triton."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_fast.errors import BackendError

FILE_NAME = "manifest.json"
VERSION = 2
_SCALARS = ("i32", "fp32")  # what a launcher can hand over beside pointers


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    divisible_by_16: bool


@dataclass(frozen=True)
class CompiledKernel:
    """One machine-code file and how it is launched. ptx: the file is PTX, which the driver compiles."""

    op: str
    name: str
    arch: int
    symbol: str
    arguments: tuple[Argument, ...]
    constants: Mapping[str, int]
    pointer_alignment_bytes: int
    num_warps: int
    shared_bytes: int
    hidden_pointers: int
    dependent_launch: bool
    ptx: bool
    file: str
    sha256: str
    triton_version: str
    code: bytes

    @classmethod
    def of_row(cls, row: dict[str, Any], directory: Path) -> CompiledKernel:
        """A row of the manifest with its file. BackendError where either is not what build.py wrote."""
        where = f"kernel {row.get('name', '?')}"
        values: dict[str, Any] = {}
        for name, kind in _ROW_TYPES.items():
            value = row.get(name)
            if not _is_a(value, kind):
                raise _damaged(directory, f"{where}: {name} is {value!r}, expected {kind.__name__}")
            values[name] = value
        if any(isinstance(value, bool) or not isinstance(value, int) for value in values["constants"].values()):
            raise _damaged(directory, f"{where}: a constant is no whole number")
        if values["pointer_alignment_bytes"] == 0 or values["num_warps"] == 0:
            raise _damaged(directory, f"{where}: an alignment or a number of warps is 0")
        values["arguments"] = tuple(_argument(item, where, directory) for item in values["arguments"])
        path = directory / values["file"]
        if Path(values["file"]).name != values["file"] or not path.is_file():
            raise _damaged(directory, f"{where}: there is no file {values['file']}")
        code = path.read_bytes()
        if (found := hashlib.sha256(code).hexdigest()) != values["sha256"]:
            raise _damaged(directory, f"{values['file']} has the SHA-256 {found}, the manifest says {values['sha256']}")
        return cls(**values, code=code)


_ROW_TYPES: dict[str, type] = {
    "op": str, "name": str, "arch": int, "symbol": str, "arguments": list, "constants": dict,
    "pointer_alignment_bytes": int, "num_warps": int, "shared_bytes": int, "hidden_pointers": int,
    "dependent_launch": bool, "ptx": bool, "file": str, "sha256": str, "triton_version": str,
}  # fmt: skip


def read_manifest(directory: Path, arch: int) -> list[CompiledKernel]:
    """The kernels for a compute capability (90 for 9.0): machine code, or PTX of an older one where there is none.

    Empty where the directory has neither. BackendError for a manifest or a file that is not as it was written.
    """
    path = directory / FILE_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise _damaged(directory, f"{FILE_NAME} cannot be read ({error})") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise _damaged(directory, f"{FILE_NAME} has version {version!r}, this build reads {VERSION}")
    if manifest.get("sources") != sources_digest():
        raise _damaged(directory, "they were compiled from other sources than these")
    rows = manifest.get("kernels")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise _damaged(directory, f"{FILE_NAME} has no list of kernels")
    chosen = [row for row in rows if row.get("arch") == arch and row.get("ptx") is False]
    if not chosen:
        chosen = [row for row in rows if row.get("ptx") is True and _is_a(row.get("arch"), int) and row["arch"] <= arch]
    return [CompiledKernel.of_row(row, directory) for row in chosen]


def sources_digest() -> str:
    """Of everything that kernels are made from."""
    digest, sources = hashlib.sha256(), Path(__file__).parent
    for path in sorted([*sources.glob("*.py"), *sources.glob("*.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _is_a(value: Any, kind: type) -> bool:
    """Numbers are counts and sizes; a truth is none."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return isinstance(value, kind)


def _argument(item: Any, where: str, directory: Path) -> Argument:
    match item:
        case {"name": str(name), "type": str(kind), "divisible_by_16": bool(divisible)} if (
            kind in _SCALARS or kind.startswith("*")
        ):
            return Argument(name, kind, divisible)
    raise _damaged(directory, f"{where}: an argument is {item!r}")


def _damaged(directory: Path, what: str) -> BackendError:
    return BackendError(
        f"GPU kernels in {directory} cannot be used: {what}; delete that directory, and they are compiled anew"
    )
