"""A manifest that is damaged, or files that are not those it names, are refused with the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma2_fast.errors import BackendError
from gemma2_fast.triton_kernels.manifest import read_manifest, sources_digest

Manifest = dict[str, Any]
CODE = b"\x7fELF and so on"


def write(directory: Path, change: Callable[[Manifest], Any] = lambda _: None) -> None:
    row = {
        "op": "geglu",
        "name": "geglu_of_bf16",
        "arch": 90,
        "symbol": "geglu_kernel",
        "arguments": [{"name": "width", "type": "i32", "divisible_by_16": True}],
        "constants": {"BLOCK": 1024},
        "pointer_alignment_bytes": 16,
        "num_warps": 4,
        "shared_bytes": 0,
        "hidden_pointers": 2,
        "dependent_launch": False,
        "ptx": False,
        "file": "geglu.cubin",
        "sha256": hashlib.sha256(CODE).hexdigest(),
        "triton_version": "3.9.0",
    }
    manifest = {"version": 2, "sources": sources_digest(), "kernels": [row]}
    change(manifest)
    (directory / "geglu.cubin").write_bytes(CODE)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_row_says(tmp_path: Path) -> None:
    write(tmp_path)
    (kernel,) = read_manifest(tmp_path, 90)
    assert (kernel.op, kernel.symbol, kernel.constants, kernel.code) == ("geglu", "geglu_kernel", {"BLOCK": 1024}, CODE)
    assert kernel.arguments[0].divisible_by_16
    assert read_manifest(tmp_path, 80) == []
    assert read_manifest(tmp_path / "nowhere", 90) == []


def in_row(**changes: Any) -> Callable[[Manifest], Any]:
    return lambda manifest: manifest["kernels"][0].update(changes)


FAULTS: dict[str, tuple[Callable[[Manifest], Any], str]] = {
    "an older version": (lambda m: m.update(version=1), "has version 1, this build reads 2"),
    "other sources": (lambda m: m.update(sources="0"), "compiled from other sources"),
    "no kernels": (lambda m: m.pop("kernels"), "no list of kernels"),
    "a kernel that is none": (lambda m: m["kernels"].append(3), "no list of kernels"),
    "a missing number": (lambda m: m["kernels"][0].pop("num_warps"), "geglu_of_bf16: num_warps is None, expected int"),
    "a truth for a number": (in_row(num_warps=True), "num_warps is True, expected int"),
    "a negative number": (in_row(shared_bytes=-1), "shared_bytes is -1"),
    "no warps": (in_row(num_warps=0), "number of warps is 0"),
    "no constants": (in_row(constants=[]), r"constants is \[\], expected dict"),
    "a constant that is text": (in_row(constants={"BLOCK": "1024"}), "a constant is no whole number"),
    "an argument without a type": (in_row(arguments=[{"name": "width"}]), "an argument is {'name': 'width'}"),
    "an argument nobody can pass": (
        in_row(arguments=[{"name": "w", "type": "fp16", "divisible_by_16": False}]),
        "an argument is",
    ),
    "a file that is not there": (in_row(file="other.cubin"), "there is no file other.cubin"),
    "a file elsewhere": (in_row(file="../geglu.cubin"), "there is no file ../geglu.cubin"),
    "a file of another content": (
        in_row(sha256="0" * 64),
        "geglu.cubin has the SHA-256 [0-9a-f]{64}, the manifest says 0{64}",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str, tmp_path: Path) -> None:
    change, message = FAULTS[name]
    write(tmp_path, change)
    with pytest.raises(BackendError, match=f"GPU kernels in .* cannot be used: .*{message}.*; delete that directory"):
        read_manifest(tmp_path, 90)


def test_a_damaged_cubin(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "geglu.cubin").write_bytes(CODE[:-1] + b"?")
    with pytest.raises(BackendError, match="geglu.cubin has the SHA-256"):
        read_manifest(tmp_path, 90)


def test_a_manifest_that_is_cut_off(tmp_path: Path) -> None:
    write(tmp_path)
    whole = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(BackendError, match="manifest.json cannot be read"):
        read_manifest(tmp_path, 90)
