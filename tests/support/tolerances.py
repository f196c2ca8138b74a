"""How close each op must come to the exact result. One row an op; a factor other than 2 says why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """`factor` times the error of the plain version, plus `floor_roundings` float32 roundings of the largest value.

    The floor keeps the bound above zero where the plain version happens to be exact (one element, a power of two).
    """

    factor: float = 2.0
    floor_roundings: float = 1.0
    why: str = ""


TOLERANCES: dict[str, Tolerance] = {
    "add": Tolerance(),
    "attention": Tolerance(
        factor=3.0,
        floor_roundings=4.0,
        why="NumPy rounds exp and tanh correctly; here each is a polynomial with an error of one to two roundings, "
        "which a score near the cap carries into the exponent",
    ),
    "dequantize": Tolerance(factor=0.0, floor_roundings=0.0, why="the exact value of the format is float32"),
    "geglu": Tolerance(floor_roundings=2.0),
    "matmul": Tolerance(floor_roundings=2.0),
    "rms_norm": Tolerance(floor_roundings=2.0),
    "rope": Tolerance(),
    "scale": Tolerance(),
    "softcap": Tolerance(floor_roundings=3.0, why="plain tanh is correctly rounded; the polynomial has 2e-7"),
}
