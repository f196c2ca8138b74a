from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma2_fast.bench import engines
from gemma2_fast.bench.engines import Engine, EngineSpec, wait_until_idle
from gemma2_fast.errors import BackendError

FAKE_WORKERS = Path(__file__).parent / "fake_workers"


def spec(kind: str, **options: Any) -> EngineSpec:
    return EngineSpec(kind, kind, {"options": {"speed": 100.0, **options}}, workers=FAKE_WORKERS)


@contextmanager
def running(kind: str, **options: Any) -> Iterator[Engine]:
    with Engine(spec(kind, **options)) as engine:
        yield engine


def test_commands_and_answers() -> None:
    with running("steady") as engine:
        assert (engine.load_s, engine.versions) == (0.25, {"steady": "1.0"})
        assert (engine.peak_bytes, engine.anonymous_bytes) == (1 << 20, 1 << 19)
        assert engine.prefill(50) == 0.5
        assert engine.decode(8, 16, 20) == 0.2
        assert engine.encode("ab") == [97, 98]
        assert engine.likeliest([1]) == [(7, 9.0), (8, 3.0)]


def test_closing_ends_the_process() -> None:
    with running("steady") as engine:
        pid = engine._process.pid
        assert Path(f"/proc/{pid}").exists()
    assert not Path(f"/proc/{pid}").exists()


def test_environment_reaches_the_worker() -> None:
    workers = EngineSpec(
        "steady", "steady", {"options": {"speed": 1.0}}, environment={"FAST": "7"}, workers=FAKE_WORKERS
    )
    with Engine(workers) as engine:
        environment = Path(f"/proc/{engine._process.pid}/environ").read_bytes().split(b"\0")
    assert b"FAST=7" in environment


def test_missing_interpreter() -> None:
    with pytest.raises(BackendError, match="cannot start /no/such/python"):
        Engine(replace(spec("steady"), python="/no/such/python"))


def test_missing_package_says_what_to_do() -> None:
    with pytest.raises(BackendError, match=r"No module named 'absent'; is it installed there\? see bench/README.md"):
        Engine(spec("absent"))


def test_worker_that_says_nothing() -> None:
    with pytest.raises(BackendError, match="silent ended with status 0; the last it said: silent starts"):
        Engine(spec("silent"))


def test_worker_that_dies_is_quoted() -> None:
    with (
        running("fragile") as engine,
        pytest.raises(BackendError, match="fragile ended with status 3; the last it said: .*out of luck"),
    ):
        engine.decode(1, 1, 1)


def test_worker_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ANSWER_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(engines, "CLOSE_TIMEOUT_SECONDS", 0.05)
    sleeper = Path(__file__).parent / "sleeping_worker.py"
    with pytest.raises(BackendError, match="has not answered"):
        Engine(replace(spec("sleepy"), workers=sleeper))


def test_idle_engines_pass() -> None:
    with running("steady") as one, running("calm") as other:
        one.prefill(10)
        wait_until_idle([one, other])


def test_engine_that_spins_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "IDLE_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(engines, "CLOSE_TIMEOUT_SECONDS", 0.05)
    with running("steady") as calm, running("spinning") as busy:
        busy.prefill(10)
        with pytest.raises(BackendError, match="spinning still computes"):
            wait_until_idle([calm, busy])


def test_real_worker_names_a_missing_engine() -> None:
    absent = EngineSpec("nothing", "nothing", {}, python=sys.executable)
    with pytest.raises(BackendError, match="No module named 'nothing_engine'"):
        Engine(absent)
