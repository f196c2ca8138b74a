"""Markdown and plots of what the other measurements wrote as JSON: roofline, tokens a second against context and batch.

    gemma2-fast bench report ops.json int8.json peers.json --out report

Writes report.md and the plots that the files have figures for. Plots need matplotlib, which is in the [bench] extra.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma2_fast.bench import flat, plots
from gemma2_fast.bench.command import main
from gemma2_fast.bench.gpu import rows as gpu_rows
from gemma2_fast.bench.record import Row, read_record

Record = dict[str, Any]
SERIES_SHOWN = 5
LIMIT_NAMES = {
    "read_bytes": "the read bandwidth",
    "float32_operations": "the float32 peak",
    "int8_operations": "the int8 peak",
}


def markdown(records: Sequence[Record], pictures: Sequence[str]) -> str:
    """A section for each record, in the order given."""
    parts = ["# Measurements\n"]
    parts += [f"![{name.removesuffix('.png')}]({name})\n" for name in pictures]
    for content in records:
        parts.append(f"## {TITLES[content['kind']]}\n")
        parts.append(origin(content))
        parts.append(TABLES[content["kind"]](content))
    return "\n".join(parts)


def origin(content: Record) -> str:
    """Where, when and with what the figures were measured: no figure goes without it."""
    machine = content["machine"]
    settings = ", ".join(f"{name} {plain(value)}" for name, value in content["settings"].items() if name != "engines")
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    return (
        f"{content['date'][:10]}, {machine['processor']}, {machine['cpus']} CPUs, {machine['memory_gib']:.0f} GiB, "
        f"{machine['system']}; commit {content['commit'] or 'unknown'}; {versions}.  \n{settings}.\n"
    )


def plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={plain(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ",".join(map(plain, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, cells))} |\n" for cells in lines)


def machine_table(content: Record) -> str:
    header = ("instruction set", "threads", "read GB/s", "float32 GFLOP/s", "int8 GOP/s")
    names = ("read_bytes", "float32_operations", "int8_operations")
    return table(
        header, ([r["instruction_set"], r["threads"], *(f"{r[name]:.1f}" for name in names)] for r in content["rows"])
    )


def ops_table(content: Record) -> str:
    header = ("op", "shape", "instruction set", "threads", "µs", "rate", "of the ceiling", "relative error")
    return table(
        header,
        (
            (
                row["op"],
                row["shape"],
                row["instruction_set"],
                row["threads"],
                f"{row['microseconds']:.1f}",
                f"{row['rate']:.1f} {row['unit']}",
                f"{row['percent']:.0f} % of {row['ceiling']:.0f}",
                f"{row['error']:.1e}",
            )
            for row in content["rows"]
        ),
    )


def generate_table(content: Record) -> str:
    header = ("work", "tokens/s", "time", "rate", "of the limit", "limits GB/s, GFLOP/s, int8 GOP/s", "peak GiB")
    return table(
        header,
        (
            (
                work_name(row),
                f"{row['tokens_per_s']:.2f}",
                f"{row['first_token_s']:.3f} s to the first token"
                if row["work"] == "prefill"
                else f"{1000 * row['step_s']:.1f} ms a step",
                f"{row['gop_per_s']:.0f} GOP/s"
                if row["work"] == "prefill"
                else f"{row['gb_per_s']:.1f} GB/s of {row['bytes_per_step'] / 1e9:.3f} GB",
                shares(row),
                limits(row),
                f"{row['peak_bytes'] / 2**30:.2f}",
            )
            for row in content["rows"]
        ),
    )


def peers_table(content: Record) -> str:
    header = ("work", "engine", "tokens/s", "ours to it", "of the limit", "limits GB/s, GFLOP/s, int8 GOP/s")
    speeds = table(
        header,
        (
            (
                work_name(row),
                row["engine"],
                f"{row['tokens_per_s']:.2f}",
                f"{row['ratio']:.2f}",
                shares(row),
                limits(row),
            )
            for row in content["rows"]
        ),
    )
    engines = content["settings"]["engines"].items()
    header = ("engine", "model", "GB a token", "load s", "peak GiB", "checked before")
    return f"{speeds}\n" + table(
        header,
        (
            (
                name,
                engine["model"],
                f"{engine['bytes_per_step'] / 1e9:.3f}",
                f"{engine['load_s']:.1f}",
                f"{engine['peak_bytes'] / 2**30:.2f}",
                engine["check"] or "by the test suite",
            )
            for name, engine in engines
        ),
    )


def gpu_table(content: Record) -> str:
    missing = "".join(f"\nNot measured: {reason}\n" for reason in content["settings"]["not_measured"])
    return table(gpu_rows.COLUMNS, (gpu_rows.cells(row) for row in content["rows"])) + missing


def flat_table(content: Record) -> str:
    """A table for each part that was measured; of the long generation the slopes and some of its samples."""
    rows = content["rows"]
    decoded = [row for row in rows if row["part"] in ("prompt", "context")]
    series = [row for row in rows if row["part"] == "series"]
    parts = []
    if decoded:
        header = ["part", "model", "context", "tokens/s", "to the first", "cache MiB", "anonymous MiB", "of the limit"]
        parts.append(table(header, map(flat_cells, decoded)))
    if series:
        shown = series[:: -max(1, len(series) // SERIES_SHOWN)][::-1]
        cells = ((row["tokens"], f"{row['tokens_per_s']:.1f}", mebibytes(row, "anonymous_bytes")) for row in shown)
        parts.append(table(["tokens generated", "tokens/s", "anonymous MiB"], cells))
    parts += [f"{flat.line_of(row)}\n" for row in rows if row["part"] == "slope"]
    return "\n".join(parts)


def flat_cells(row: Row) -> tuple[object, ...]:
    ratio = f"{row['speed_ratio']:.3f}" if "speed_ratio" in row else ""
    memory = (mebibytes(row, "cache_bytes"), mebibytes(row, "anonymous_bytes"))
    return row["part"], row["model"], row["context"], f"{row['tokens_per_s']:.2f}", ratio, *memory, shares(row)


def mebibytes(row: Row, name: str) -> str:
    return f"{row[name] / 2**20:.2f}" if name in row else ""


def work_name(row: Row) -> str:
    if row["work"] == "prefill":
        return f"prefill {row['context']}"
    return f"decode at context {row['context']}, batch {row['batch']}"


def shares(row: Row) -> str:
    return ", ".join(f"{percent:.0f} % of {LIMIT_NAMES[name]}" for name, percent in row["percent"].items())


def limits(row: Row) -> str:
    found = row["limits"]
    return f"{found['read_bytes']:.1f}, {found['float32_operations']:.0f}, {found['int8_operations']:.0f}"


TITLES = {
    "machine": "Ceilings of the machine",
    "ops": "Operations",
    "generate": "Whole model",
    "flat": "Speed and memory against length",
    "peers": "Beside other engines",
    "gpu": "On a GPU",
}
TABLES: dict[str, Callable[[Record], str]] = {
    "machine": machine_table,
    "ops": ops_table,
    "generate": generate_table,
    "flat": flat_table,
    "peers": peers_table,
    "gpu": gpu_table,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="JSON", help="what the other measurements wrote")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write into (default: report)")
    parser.add_argument("--no-plots", action="store_true", help="Markdown alone, without matplotlib")


def run(args: argparse.Namespace) -> None:
    records = [read_record(path) for path in args.results]
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = [] if args.no_plots else plots.draw(records, args.out)
    path = args.out / "report.md"
    path.write_text(markdown(records, pictures), encoding="utf-8")
    print(f"written: {', '.join(str(args.out / name) for name in ['report.md', *pictures])}")


if __name__ == "__main__":
    sys.exit(main(__doc__, add_arguments, run))
