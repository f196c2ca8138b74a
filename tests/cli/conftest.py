from __future__ import annotations

import pytest

from tests.cli.fake_generator import FakeGenerator


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGenerator:
    """Every command finds this instead of the class Generator."""
    generator = FakeGenerator()
    for command in ("generate", "chat", "info", "tokenize"):
        monkeypatch.setattr(f"gemma2_fast.cli.{command}.Generator", generator)
    monkeypatch.setattr("gemma2_fast.cli.tokenize.load_text", lambda checkpoint: (checkpoint.tokenizer, None))
    return generator
