"""Which tests `make check` leaves out, and that Triton interprets kernels here, unless a GPU is to run them.

Triton decides that when it is imported, so it is said before anything is; tests that compile do so in processes of
their own (triton_kernels/compiler.py). So is the number of torch's threads: processes that share the tests share the
processors too.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

if os.environ.get("GEMMA2_FAST_GPU") != "1":  # set by `make gpu`
    os.environ["TRITON_INTERPRET"] = "1"

WHOLE_MODELS = Path(__file__).parent / "model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole models take minutes together, so all of them count as slow."""
    for item in items:
        if item.path.is_relative_to(WHOLE_MODELS):
            item.add_marker(pytest.mark.slow)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if count := sum("an NVIDIA GPU" in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(f"tests/gpu: {count} tests were not run, each needs an NVIDIA GPU: run `make gpu`")
