"""What a quantised file says in its metadata: where it came from, and what its tensors of bytes are.

gemma2_fast.format_version   "2"
gemma2_fast.quantization     "int8"
gemma2_fast.source           "google/gemma-2-2b, BF16"
gemma2_fast.tool_version     "0.1.0"
gemma2_fast.tensor.NAME      "INT8_G128 256000 2304": NAME, which the file stores as U8 [bytes], is such a matrix
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma2_fast.errors import FileFormatError
from gemma2_fast.quant import FORMATS, Format
from gemma2_fast.weights.messages import quoted

FORMAT_VERSION = 2  # 1 had another INT4_G32
# Far above any matrix, and low enough for its size in bytes to fit every integer type it meets later.
MAX_ROWS = MAX_COLS = 1 << 24

_PREFIX = "gemma2_fast."
_TENSOR = _PREFIX + "tensor."
_VERSION = _PREFIX + "format_version"
_FIELDS = ("quantization", "source", "tool_version")
_MATRIX = re.compile(r"(\S{1,40}) ([1-9][0-9]{0,17}) ([1-9][0-9]{0,17})", re.ASCII)

Matrices = Mapping[str, tuple[Format, tuple[int, int]]]


@dataclass(frozen=True)
class Origin:
    """How a quantised checkpoint came about: "int8" or "int4", of what, made by which version of this package."""

    quantization: str
    source: str
    tool_version: str


def to_metadata(origin: Origin, matrices: Matrices) -> dict[str, str]:
    """The strings that `from_metadata` reads."""
    fields = {_PREFIX + field: getattr(origin, field) for field in _FIELDS}
    tensors = {_TENSOR + name: f"{format.name} {rows} {cols}" for name, (format, (rows, cols)) in matrices.items()}
    return {_VERSION: str(FORMAT_VERSION), **fields, **tensors}


def from_metadata(path: Path, metadata: Mapping[str, str]) -> tuple[Origin | None, Matrices]:
    """None and nothing for a file that is not ours; FileFormatError for one that only claims to be."""
    ours = {key: value for key, value in metadata.items() if key.startswith(_PREFIX)}
    if not ours:
        return None, {}
    _check_version(path, ours)
    unknown = [key for key in ours if not key.startswith(_TENSOR) and key.removeprefix(_PREFIX) not in _FIELDS]
    missing = [_PREFIX + field for field in _FIELDS if _PREFIX + field not in ours]
    if unknown or missing:
        fault = f"lacks {quoted(missing)}" if missing else f"has the unknown {quoted(unknown)}"
        raise FileFormatError(f"{path}: its metadata {fault}; quantise the model again")
    origin = Origin(*(ours[_PREFIX + field] for field in _FIELDS))
    matrices = {key.removeprefix(_TENSOR): _matrix(path, key, ours[key]) for key in ours if key.startswith(_TENSOR)}
    return origin, matrices


def _check_version(path: Path, ours: dict[str, str]) -> None:
    version = ours.pop(_VERSION, None)
    if version == str(FORMAT_VERSION):
        return
    if version is None or not re.fullmatch("[0-9]{1,9}", version, re.ASCII):
        raise FileFormatError(f"{path}: {_VERSION} must be a number, got {quoted(version)}; quantise the model again")
    by = quoted(ours.get(_PREFIX + "tool_version", "unknown"))
    raise FileFormatError(
        f"{path} is a quantised file of format version {version}, written by gemma2-fast {by}; "
        f"this gemma2-fast reads version {FORMAT_VERSION}: "
        + ("upgrade it" if int(version) > FORMAT_VERSION else "quantise the model again")
    )


def _matrix(path: Path, key: str, text: str) -> tuple[Format, tuple[int, int]]:
    parts = _MATRIX.fullmatch(text)
    if parts is None:
        raise FileFormatError(
            f"{path}: metadata {quoted(key)} must be a format and two dimensions, such as 'INT8_G128 256000 2304', "
            f"got {quoted(text)}"
        )
    known = {name: format for name, format in FORMATS.items() if format.block_rows > 1}
    format, rows, cols = known.get(parts[1]), int(parts[2]), int(parts[3])
    if format is None:
        raise FileFormatError(
            f"{path}: metadata {quoted(key)} names the unknown format {quoted(parts[1])}; "
            f"known are {', '.join(known)}: upgrade gemma2-fast or quantise the model again"
        )
    if rows > MAX_ROWS or cols > MAX_COLS:
        raise FileFormatError(f"{path}: metadata {quoted(key)}: {rows} x {cols} is beyond any matrix")
    return format, (rows, cols)
