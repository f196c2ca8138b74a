"""Runs the tests of this room and memcheck on a machine with a GPU, and prints and keeps what came of them.

    python -m tests.gpu.run build/gpu

The directory gets report.json and a log of each step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Steps of their own processes: an illegal access ends all that its process does on the GPU. They run at once, as most
# of their time is Triton's compiler.
TEST_FILES = {name: f"tests/gpu/test_{name}.py" for name in ("kernels", "attention", "models")}
MOST_SECONDS = 360.0
MEMCHECK = "memcheck"
MEMCHECK_SECONDS = 90.0
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
LAST_LINES = 30  # of the log of a step that failed


@dataclass(frozen=True)
class Row:
    """error_over_bound: the worst of a test's, None for one that compares none. result: "pass" or what else."""

    step: str
    case: str
    error_over_bound: float | None
    result: str


def main() -> int:
    directory = Path(sys.argv[1])
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    rows = [*tested(directory), memchecked(directory)]
    (directory / "report.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    for step in dict.fromkeys(row.step for row in rows if row.result != "pass"):
        print(f"\n-- the end of {log_of(directory, step)}")
        print("\n".join(log_of(directory, step).read_text(encoding="utf-8").splitlines()[-LAST_LINES:]))
    print(table(rows))
    return int(any(row.result != "pass" for row in rows))


def tested(directory: Path) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as temporary:
        results = {step: Path(temporary) / f"{step}.xml" for step in TEST_FILES}
        # Versions of packages are the machine's, so what they warn of is no failure.
        commands = {
            step: [sys.executable, "-m", "pytest", "-v", "-W", "default", f"--junitxml={results[step]}", path]
            for step, path in TEST_FILES.items()
        }
        started = {step: start(command, log_of(directory, step)) for step, command in commands.items()}
        end = time.monotonic() + MOST_SECONDS
        for step, process in started.items():
            problem = finish(process, end - time.monotonic())
            yield from rows_of(step, results[step], problem)


def memchecked(directory: Path) -> Row:
    """A case on its own under compute-sanitizer, when the kernels have been compiled."""
    tool = next(filter(None, map(shutil.which, SANITIZERS)), None)
    log = log_of(directory, MEMCHECK)
    if tool is None:
        log.write_text(f"looked for {', '.join(SANITIZERS)}\n", encoding="utf-8")
        return Row(MEMCHECK, "a small model", None, "there is no compute-sanitizer")
    checked = [tool, "--tool", "memcheck", "--error-exitcode", "1", sys.executable, "-m", "tests.gpu.memcheck_case"]
    problem = finish(start(checked, log), MEMCHECK_SECONDS)
    return Row(MEMCHECK, "a small model", None, problem or "pass")


def log_of(directory: Path, step: str) -> Path:
    return directory / f"{step}.log"


def start(command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log.open("wb") as out:
        return subprocess.Popen(
            command, env={**environment, "GEMMA2_FAST_GPU": "1"}, stdout=out, stderr=subprocess.STDOUT
        )


def finish(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """What went wrong, if anything did. A process that is late is interrupted, so that it can say how far it came."""
    try:
        status = process.wait(max(seconds, 0.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(10.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        return "took too long"
    return None if status == 0 else f"ended with status {status}"


def rows_of(step: str, results: Path, problem: str | None) -> Iterator[Row]:
    """A row a test of JUnit's file; one more where the step went wrong, or ran no test, and no test says so."""
    cases = list(xml.parse(results).iter("testcase")) if results.exists() else []
    rows = [_row(step, case) for case in cases]
    yield from rows
    if not any(row.result != "pass" for row in rows) and (problem or not rows):
        yield Row(step, "all of it", None, problem or "ran no test")


def _row(step: str, case: xml.Element) -> Row:
    ratios = [float(p.attrib["value"]) for p in case.iter("property") if p.attrib["name"] == "error over bound"]
    results = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
    return Row(step, case.attrib["name"], max(ratios, default=None), results[0] if results else "pass")


def table(rows: Sequence[Row]) -> str:
    """A line a row, and a last one that counts them."""
    lines = [f"{'result':8} {'error/bound':>11}  case"]
    for row in rows:
        ratio = "" if row.error_over_bound is None else f"{row.error_over_bound:.2f}"
        lines.append(f"{row.result:8} {ratio:>11}  {row.step}: {row.case}")
    passed = sum(row.result == "pass" for row in rows)
    return "\n".join((*lines, f"{passed} of {len(rows)} passed"))


if __name__ == "__main__":
    sys.exit(main())
