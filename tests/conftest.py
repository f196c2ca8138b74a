"""Which tests `make check` leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest

WHOLE_MODELS = Path(__file__).parent / "model"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of whole models take minutes together, so all of them count as slow."""
    for item in items:
        if item.path.is_relative_to(WHOLE_MODELS):
            item.add_marker(pytest.mark.slow)
