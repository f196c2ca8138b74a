"""Plots of result files, as PNG: what bounds each operation, and speed against context, batch and length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gemma2_fast.bench.engines import OURS
from gemma2_fast.errors import BackendError

Record = dict[str, Any]
Points = dict[str, list[tuple[float, float]]]

# Colours that stay apart for colour-blind readers; ours is always the first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PEAKS = {"float32_operations": "float32 peak,", "int8_operations": "int8 peak,"}


def draw(records: Sequence[Record], directory: Path) -> list[str]:
    """Names of the files written. BackendError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendError(
            f"plots need matplotlib ({error}): pip install 'gemma2-fast[bench]', or ask for --no-plots"
        ) from error
    names = []
    kinds = {
        "roofline": roofline,
        "context": against_context,
        "batch": against_batch,
        "flat": flat_speed,
        "series": flat_series,
    }
    for name, fill in kinds.items():
        figure = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
        axes = figure.add_subplot()
        if fill(axes, records):
            axes.grid(True, which="major", alpha=0.3)
            figure.savefig(directory / f"{name}.png")
            names.append(f"{name}.png")
    return names


def roofline(axes: Any, records: Sequence[Record]) -> bool:
    """Operations a second against operations a byte, under the roofs measured beside them.

    Operations on what lies in caches have no place under a roof of memory.
    """
    rows = [row for row in rows_of(records, "ops") if not row["cached"]]
    if not rows:
        return False
    kinds: Points = {}
    for row in rows:
        intensity = row["operations"] / row["num_bytes"]
        name = f"{row['op']}, {row['instruction_set']}, {row['threads']} thread(s)"
        kinds.setdefault(name, []).append((intensity, row["operations"] / row["microseconds"] / 1e3))
    for index, (kind, points) in enumerate(kinds.items()):
        marker = "os^Dv<>P*X"[index // len(COLOURS) % 10]
        axes.scatter(*zip(*points, strict=True), label=kind, marker=marker, color=COLOURS[index % len(COLOURS)], s=28)
    intensities = [x for points in kinds.values() for x, _ in points]
    left, right = min(intensities) / 2, max(intensities) * 2
    roofs = {
        limit: max(row["ceiling"] for row in rows if row["limit"] == limit) for limit in {r["limit"] for r in rows}
    }
    bandwidth = roofs.pop("read_bytes", None)
    for limit, peak in roofs.items():
        begin = left if bandwidth is None else min(max(left, peak / bandwidth), right)
        axes.plot([begin, right], [peak, peak], color="black", linewidth=1, linestyle="--")
        axes.annotate(f"{PEAKS[limit]} {peak:.0f} GOP/s", (right, peak), ha="right", va="bottom")
    if bandwidth is not None:
        end = min(max(roofs.values()) / bandwidth, right) if roofs else right
        axes.plot([left, end], [bandwidth * left, bandwidth * end], color="black", linewidth=1)
        axes.annotate(f"{bandwidth:.1f} GB/s", (left, bandwidth * left), xytext=(4, 12), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlim=(left, right), title="Operations under the roofs of the machine")
    axes.set(xlabel="operations a byte", ylabel="GOP/s")
    axes.set_ylim(bottom=min(y for points in kinds.values() for _, y in points) / 2)
    axes.legend(fontsize="x-small", ncols=2, loc="lower right")
    return True


def against_context(axes: Any, records: Sequence[Record]) -> bool:
    """Decode of one sequence and prefill, each line a run of `generate`."""
    lines: Points = {}
    for content in of_kind(records, "generate"):
        for row in content["rows"]:
            if row["batch"] == 1:
                point = (row["context"], row["tokens_per_s"])
                lines.setdefault(f"{row['work']}, {run_name(content)}", []).append(point)
    axes.set(xlabel="context, tokens", ylabel="tokens/s", title="Speed against context", xscale="symlog", yscale="log")
    return draw_lines(axes, lines)


def against_batch(axes: Any, records: Sequence[Record]) -> bool:
    """Decode of many sequences together, ours and the peers'."""
    lines: Points = {}
    for content in of_kind(records, "generate"):
        contexts = [row["context"] for row in content["rows"] if row["work"] == "decode" and row["batch"] > 1]
        for row in content["rows"]:
            if row["work"] == "decode" and row["context"] in contexts:
                lines.setdefault(run_name(content), []).append((row["batch"], row["tokens_per_s"]))
    for content in of_kind(records, "peers"):
        for row in content["rows"]:
            if row["work"] == "decode":
                name = f"{run_name(content)} beside peers" if row["engine"] == OURS else row["engine"]
                lines.setdefault(name, []).append((row["batch"], row["tokens_per_s"]))
    axes.set(xlabel="sequences together", ylabel="tokens/s, all together", title="Decode speed against batch")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    return draw_lines(axes, lines)


def flat_speed(axes: Any, records: Sequence[Record]) -> bool:
    """Decode of one sequence at contexts and after prompts, a line a model."""
    lines: Points = {}
    for row in rows_of(records, "flat"):
        if row["part"] in ("prompt", "context"):
            name = f"{row['model']}, at contexts" if row["part"] == "context" else f"{row['model']}, after prompts"
            lines.setdefault(name, []).append((row["context"], row["tokens_per_s"]))
    axes.set(xlabel="context, tokens", ylabel="tokens/s", title="Decode speed against context")
    return draw_lines(axes, lines)


def flat_series(axes: Any, records: Sequence[Record]) -> bool:
    """One long generation: speed, and anonymous memory on an axis of its own."""
    rows = [row for row in rows_of(records, "flat") if row["part"] == "series"]
    if not rows:
        return False
    tokens = [row["tokens"] for row in rows]
    memory = axes.twinx()
    (fast,) = axes.plot(tokens, [row["tokens_per_s"] for row in rows], color=COLOURS[0], label="speed")
    (held,) = memory.plot(tokens, [row["anonymous_bytes"] / 2**20 for row in rows], color=COLOURS[1], label="memory")
    axes.set(xlabel="tokens generated", ylabel="tokens/s", title=f"One generation of {rows[0]['model']}")
    memory.set_ylabel("anonymous memory, MiB")
    axes.set_ylim(bottom=0)
    memory.set_ylim(bottom=0)
    axes.legend(handles=[fast, held], fontsize="small", loc="lower right")
    return True


def draw_lines(axes: Any, lines: Points) -> bool:
    for index, (name, points) in enumerate(lines.items()):
        style = ("-", "--", ":")[index // len(COLOURS) % 3]
        color = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", linestyle=style, label=name, color=color)
    if lines:
        axes.set_ylim(bottom=None if axes.get_yscale() == "log" else 0)
        axes.legend(fontsize="small")
    return bool(lines)


def run_name(content: Record) -> str:
    settings = content["settings"]
    options = " ".join(str(value) for value in settings["options"].values())
    return f"{OURS} {Path(settings['model']).name} {options}".strip()


def of_kind(records: Sequence[Record], kind: str) -> Iterator[Record]:
    return (content for content in records if content["kind"] == kind)


def rows_of(records: Sequence[Record], kind: str) -> list[dict[str, Any]]:
    return [row for content in of_kind(records, kind) for row in content["rows"]]
