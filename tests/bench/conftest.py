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
    shape = {"layers": 4, "width": 64, "mlp_width": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
    monkeypatch.setitem(shapes.SIZES, "tiny", shapes.gemma2(**shape, query_scalar=16, vocab_size=512))
    return "tiny"


@pytest.fixture
def tiny_recurrent_size(monkeypatch: pytest.MonkeyPatch) -> str:
    """Five layers, two of every three recurrent, and a window of 16 earlier keys."""
    shape = {"layers": 5, "width": 64, "mlp_width": 96, "heads": 4, "head_dim": 16, "vocab_size": 512}
    monkeypatch.setitem(shapes.SIZES, "tiny-recurrent", shapes.recurrent_gemma(**shape, window=16))
    return "tiny-recurrent"


@pytest.fixture
def tiny_recurrent_checkpoint(tiny_recurrent_size: str, tmp_path: Path) -> Path:
    prepare(tmp_path / "models", tiny_recurrent_size, {})
    return tmp_path / "models" / f"{tiny_recurrent_size}-hf"


@pytest.fixture
def tiny_checkpoint(tiny_size: str, tmp_path: Path) -> Path:
    prepare(tmp_path / "models", tiny_size, {})
    return tmp_path / "models" / f"{tiny_size}-hf"
