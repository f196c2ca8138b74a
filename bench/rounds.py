"""Engines take turns at the same work, with the machine's limits measured in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Limits = dict[str, float]
STEP_TOKENS = 512  # that a step of our engine takes from prompts


class Timed(Protocol):
    """What can be told to work: engines.Engine, or a stand-in for one."""

    def prefill(self, tokens: int) -> float: ...
    def decode(self, batch: int, context: int, steps: int) -> float: ...


@dataclass(frozen=True)
class Work:
    """prefill: a prompt of `context` tokens; decode: `steps` steps of `batch` sequences after such prompts."""

    kind: Literal["prefill", "decode"]
    context: int
    batch: int = 1
    steps: int = 1

    @property
    def name(self) -> str:
        if self.kind == "prefill":
            return f"prefill {self.context}"
        return f"decode batch {self.batch}, context {self.context}"

    @property
    def tokens(self) -> int:
        return self.context if self.kind == "prefill" else self.batch * self.steps

    @property
    def most_tokens(self) -> int:
        """Of one sequence: in a batch those that started first go on while the last prompts are evaluated."""
        head_start = 0 if self.batch == 1 else self.batch * (self.context // STEP_TOKENS + 2)
        return self.context + self.steps + 1 + head_start

    def seconds(self, engine: Timed) -> float:
        if self.kind == "prefill":
            return engine.prefill(self.context)
        return engine.decode(self.batch, self.context, self.steps)


@dataclass(frozen=True)
class Sample:
    """One run. limits: the better of those measured just before and just after it, in 10^9 a second."""

    engine: str
    work: Work
    round_index: int
    seconds: float
    limits: Limits


Turn = tuple[str, Timed, Work]  # the first names the samples


def alternate(
    engines: dict[str, Timed],
    works: Sequence[Work],
    rounds: int,
    *,
    limits: Callable[[], Limits],
    settle: Callable[[], None],
) -> Iterator[Sample]:
    """In every round each work is done by each engine in turn."""
    turns = [[(name, engine, work) for name, engine in engines.items()] for work in works]
    return take_turns(turns, rounds, limits=limits, settle=settle)


def take_turns(
    turns: Sequence[Sequence[Turn]], rounds: int, *, limits: Callable[[], Limits], settle: Callable[[], None]
) -> Iterator[Sample]:
    """In every round all turns are taken, those to be compared after each other, the next of them first in the next.

    settle returns when no engine computes any more; it is called before everything that is timed.
    """
    settle()
    before = limits()
    for round_index in range(rounds):
        for compared in turns:
            first = round_index % len(compared)
            for name, engine, work in [*compared[first:], *compared[:first]]:
                settle()
                seconds = work.seconds(engine)
                settle()
                after = limits()
                best = {limit: max(rate, after[limit]) for limit, rate in before.items()}
                yield Sample(name, work, round_index, seconds, best)
                before = after


def longest(works: Sequence[Work], max_positions: int) -> int:
    """Tokens that a sequence of any of the works may reach."""
    return min(max(work.most_tokens for work in works), max_positions)
