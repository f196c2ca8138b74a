"""A measured figure of a GPU beside its ceiling, its peers and its bars. Needs no torch, so that reports do not."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2_fast.bench.gpu.bars import AS_FAST_AS_PEERS, Bar

STREAM, MATMUL = "stream", "matmul"  # the two ceilings
UNITS = {STREAM: ("GB/s", 1e9), MATMUL: ("TFLOP/s", 1e12)}


@dataclass(frozen=True)
class Limit:
    """The ceiling that bounds a figure, in bytes or operations a second, and how many of them one run takes."""

    name: str
    ceiling: float
    work: float


@dataclass(frozen=True)
class Missing:
    """What was not measured, and why. is_fault: because something is wrong, which fails the command."""

    reason: str
    is_fault: bool


@dataclass(frozen=True)
class Verdict:
    """value: None where there is nothing to compare, which no bar accepts."""

    bar: str
    value: float | None
    met: bool


@dataclass(frozen=True)
class GpuRow:
    """Times are medians. rate and ceiling are in `unit`; peers: microseconds of each on the same work; refused: why a
    peer was not measured; ratio: the best peer's time by ours; error: relative, of the result after it was timed."""

    what: str
    shape: str
    microseconds: float
    runs_us: list[float]
    num_bytes: float | None
    operations: float | None
    limit: str | None
    rate: float | None
    unit: str | None
    ceiling: float | None
    percent: float | None
    tokens_per_s: float | None
    error: float | None
    peers: dict[str, float]
    refused: dict[str, str]
    ratio: float | None
    verdicts: list[Verdict]


def row_of(
    what: str,
    shape: str,
    seconds: Sequence[float],
    *,
    limit: Limit | None = None,
    tokens: float | None = None,
    error: float | None = None,
    peers: Mapping[str, float] | None = None,
    refused: Mapping[str, str] | None = None,
    bars: Sequence[Bar] = (),
) -> GpuRow:
    """seconds: of every run; tokens: that one run gives; peers: median seconds."""
    median = statistics.median(seconds)
    unit, scale = UNITS[limit.name] if limit else (None, 1.0)
    rate = limit.work / median / scale if limit else None
    percent = 100 * limit.work / median / limit.ceiling if limit else None
    ratio = min(peers.values()) / median if peers else None
    compared = peers or refused
    if compared and not any(bar.quantity == "ratio" for bar in bars):
        bars = (*bars, AS_FAST_AS_PEERS)
    values = {"percent": percent, "rate": rate, "ratio": ratio}
    return GpuRow(
        what=what,
        shape=shape,
        microseconds=1e6 * median,
        runs_us=[round(1e6 * run, 3) for run in seconds],
        num_bytes=limit.work if limit and limit.name == STREAM else None,
        operations=limit.work if limit and limit.name == MATMUL else None,
        limit=limit.name if limit else None,
        rate=rate,
        unit=unit,
        ceiling=limit.ceiling / scale if limit else None,
        percent=percent,
        tokens_per_s=tokens / median if tokens else None,
        error=error,
        peers={name: 1e6 * time for name, time in (peers or {}).items()},
        refused=dict(refused or {}),
        ratio=ratio,
        verdicts=[verdict(bar, values[bar.quantity]) for bar in bars],
    )


def reason(problem: Exception) -> str:
    """The first line of what went wrong with a peer, for its place in a table."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0][:120]}" if lines else type(problem).__name__


def verdict(bar: Bar, value: float | None) -> Verdict:
    return Verdict(bar.text, value, value is not None and value >= bar.least)


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Of one row as JSON has it, for the table at the end of a run and for the report; the columns are COLUMNS."""
    of_ceiling = "" if row["percent"] is None else f"{row['percent']:.1f} % of {row['ceiling']:.0f}"
    peers = [f"{name} {us:.1f} µs" for name, us in row["peers"].items()]
    peers += [f"{name} not measured: {why}" for name, why in row["refused"].items()]
    return (
        row["what"],
        row["shape"],
        f"{row['microseconds']:.1f}",
        "" if row["tokens_per_s"] is None else f"{row['tokens_per_s']:.1f}",
        "" if row["rate"] is None else f"{row['rate']:.0f} {row['unit']}",
        of_ceiling,
        "" if row["error"] is None else f"{row['error']:.1e}",
        ", ".join(peers),
        "" if row["ratio"] is None else f"{row['ratio']:.2f}",
        "; ".join(f"{'met' if v['met'] else 'MISSED'}: {v['bar']}" for v in row["verdicts"]),
    )


COLUMNS = ("what", "shape", "µs", "tokens/s", "rate", "of the ceiling", "error", "peers", "ours to the best", "bars")


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Columns in line, those left out that no row has anything in."""
    table = [COLUMNS, *(cells(row) for row in rows)]
    used = [column for column in range(len(COLUMNS)) if any(line[column] for line in table[1:])]
    widths = [max(len(line[column]) for line in table) for column in used]
    return "\n".join(
        "  ".join(line[column].ljust(width) for column, width in zip(used, widths, strict=True)).rstrip()
        for line in table
    )


def tally(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [v["met"] for row in rows for v in row["verdicts"]]
    return f"{sum(found)} of {len(found)} bars met"
