from __future__ import annotations

from pathlib import Path

import pytest

from gemma2_fast.bench import machine, shapes
from gemma2_fast.bench.prepare import prepare


@pytest.fixture(autouse=True)
def small_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that are not worth reporting, in no time."""
    monkeypatch.setattr(machine, "BUFFER_BYTES", 1 << 20)
    monkeypatch.setattr(machine, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(machine, "PROBE_MULTIPLY_ADDS", 10_000)


@pytest.fixture
def tiny_size(monkeypatch: pytest.MonkeyPatch) -> str:
    """A size of four layers, known to `prepare` for one test."""
    monkeypatch.setitem(shapes.SIZES, "tiny", (4, 64, 96, 4, 2, 16, 16))
    monkeypatch.setattr(shapes, "VOCAB_SIZE", 512)
    return "tiny"


@pytest.fixture
def tiny_checkpoint(tiny_size: str, tmp_path: Path) -> Path:
    prepare(tmp_path / "models", tiny_size, {})
    return tmp_path / "models" / f"{tiny_size}-hf"
