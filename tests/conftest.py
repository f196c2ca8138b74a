"""Which tests `make check` leaves out, and that Triton interprets kernels here, unless a GPU is to run them.

Triton decides that when it is imported, so it is said before anything is; tests that compile do so in processes of
their own (triton_kernels/compiler.py).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if os.environ.get("GEMMA2_FAST_GPU") != "1":  # set by `make gpu`
    os.environ["TRITON_INTERPRET"] = "1"

WHOLE_MODELS = Path(__file__).parent / "model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole models take minutes together, so all of them count as slow."""
    for item in items:
        if item.path.is_relative_to(WHOLE_MODELS):
            item.add_marker(pytest.mark.slow)
