from __future__ import annotations

import itertools

from gemma2_fast.bench.rounds import Timed, Work, alternate, longest

PREFILL = Work("prefill", 512)
DECODE = Work("decode", 64, batch=8, steps=4)


class Recorded:
    """An engine that writes down what it is told and takes no time."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def prefill(self, tokens: int) -> float:
        self.log.append(f"{self.name} prefill {tokens}")
        return 2.0

    def decode(self, batch: int, context: int, steps: int) -> float:
        self.log.append(f"{self.name} decode {batch} {context} {steps}")
        return 0.5


def test_engines_alternate_and_begin_in_turn() -> None:
    log: list[str] = []
    engines: dict[str, Timed] = {name: Recorded(name, log) for name in ("a", "b")}
    samples = list(
        alternate(engines, [PREFILL, DECODE], 2, limits=lambda: {"read_bytes": 1.0}, settle=lambda: log.append("-"))
    )
    assert [entry for entry in log if entry != "-"] == [
        "a prefill 512",
        "b prefill 512",
        "a decode 8 64 4",
        "b decode 8 64 4",
        "b prefill 512",
        "a prefill 512",
        "b decode 8 64 4",
        "a decode 8 64 4",
    ]
    assert [(sample.engine, sample.round_index, sample.seconds) for sample in samples[:3]] == [
        ("a", 0, 2.0),
        ("b", 0, 2.0),
        ("a", 0, 0.5),
    ]


def test_nothing_is_timed_before_all_are_idle() -> None:
    log: list[str] = []

    def limits() -> dict[str, float]:
        log.append("limits")
        return {}

    list(alternate({"a": Recorded("a", log)}, [PREFILL], 2, limits=limits, settle=lambda: log.append("idle")))
    timed = [index for index, entry in enumerate(log) if entry != "idle"]
    assert len(timed) == 5
    assert all(log[index - 1] == "idle" for index in timed)


def test_a_run_gets_the_better_of_the_limits_around_it() -> None:
    rates = itertools.cycle([{"read_bytes": 10.0, "int8_operations": 5.0}, {"read_bytes": 7.0, "int8_operations": 9.0}])
    engines: dict[str, Timed] = {"a": Recorded("a", [])}
    (sample,) = alternate(engines, [PREFILL], 1, limits=lambda: next(rates), settle=lambda: None)
    assert sample.limits == {"read_bytes": 10.0, "int8_operations": 9.0}


def test_tokens_of_a_work() -> None:
    assert (PREFILL.tokens, DECODE.tokens) == (512, 32)
    assert (PREFILL.name, DECODE.name) == ("prefill 512", "decode batch 8, context 64")


def test_longest_sequence() -> None:
    assert longest([PREFILL], 8192) == 514
    assert longest([PREFILL, Work("decode", 8000, steps=32)], 8192) == 8033
    assert longest([DECODE], 8192) == 64 + 4 + 1 + 8 * 2  # the first of eight goes on while seven others start
    assert longest([Work("prefill", 8191)], 8192) == 8192
