"""Timing on a machine that others use too."""

from __future__ import annotations

import time
from collections.abc import Callable


def best_beside(work: Callable[[], float], ceiling: Callable[[], float], budget_seconds: float) -> tuple[float, float]:
    """Runs both in turn until the budget is spent, three times at least.

    work returns the seconds it took, ceiling a rate per second; the smallest and the largest are returned.
    """
    end = time.perf_counter() + budget_seconds
    seconds, rate = work(), ceiling()
    rounds = 1
    while rounds < 3 or time.perf_counter() < end:
        seconds, rate = min(seconds, work()), max(rate, ceiling())
        rounds += 1
    return seconds, rate
