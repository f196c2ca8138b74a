"""The bound of every op test: an error counts in units of the plain version's own error.

`exact` is the op in float64, `plain` the same formula in the kernel's own dtype, both on the inputs the kernel got.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.support.tolerances import TOLERANCES

FLOAT32_ROUNDING = 2.0**-24


def error_over_bound(op: str, actual: ArrayLike, exact: ArrayLike, plain: ArrayLike) -> float:
    """The larger of max and RMS error, each divided by its bound; at most 1 is close. Infinite for NaN or infinity."""
    tolerance = TOLERANCES[op]
    ours, ideal, usual = (np.asarray(values, np.float64) for values in (actual, exact, plain))
    if not ours.shape == ideal.shape == usual.shape:
        raise ValueError(f"shapes differ: actual {ours.shape}, exact {ideal.shape}, plain {usual.shape}")
    if not (np.isfinite(ideal).all() and np.isfinite(usual).all()):
        raise ValueError("exact and plain must be finite: a bound made of NaN or infinity accepts everything")
    if not np.isfinite(ours).all():
        return float("inf")
    floor = tolerance.floor_roundings * FLOAT32_ROUNDING
    ratios = []
    for norm in (_max, _rms):
        error = norm(ours - ideal)
        bound = tolerance.factor * norm(usual - ideal) + floor * norm(ideal)
        ratios.append(0.0 if error == 0.0 else float("inf") if bound == 0.0 else error / bound)
    return max(ratios)


def assert_close(op: str, actual: ArrayLike, exact: ArrayLike, plain: ArrayLike) -> None:
    ratio = error_over_bound(op, actual, exact, plain)
    assert ratio <= 1.0, f"{op}: the error is {ratio:.3g} times its bound"


def assert_rejected(op: str, mutant: ArrayLike, exact: ArrayLike, plain: ArrayLike, margin: float = 10.0) -> None:
    """A tolerance counts only if it rejects the mutants, and clearly so."""
    ratio = error_over_bound(op, mutant, exact, plain)
    assert ratio > margin, f"{op}: the tolerance accepts a mutant, whose error is {ratio:.3g} times the bound"


def _max(values: NDArray[np.float64]) -> float:
    return float(np.abs(values).max(initial=0.0))


def _rms(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(values**2))) if values.size else 0.0
