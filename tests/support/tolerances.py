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
        factor=4.0,
        floor_roundings=4.0,
        why="NumPy rounds exp and tanh correctly; here tanh is a rational function with an error of three roundings, "
        "which a score near the cap carries into the exponent",
    ),
    "attention int8": Tolerance(
        factor=4.0,
        floor_roundings=4.0,
        why="as attention; plain rounds queries and weights as the kernels do, to 16 and 15 bits",
    ),
    "conv1d": Tolerance(floor_roundings=2.0),
    "dequantize": Tolerance(factor=0.0, floor_roundings=0.0, why="the exact value of the format is float32"),
    "geglu": Tolerance(floor_roundings=2.0),
    "geglu triton": Tolerance(
        floor_roundings=4.0, why="x / (1 + 2^-t): the rounding of t, up to 20, is one of the exponent"
    ),
    "int8_matmul": Tolerance(
        floor_roundings=6.0, why="the two scales are multiplied first, a rounding that the plain sums do not have"
    ),
    "matmul": Tolerance(floor_roundings=2.0),
    "matmul triton": Tolerance(
        factor=4.0, floor_roundings=4.0, why="one chain of additions a lane, BLAS has many short ones"
    ),
    "rg_lru": Tolerance(floor_roundings=4.0),
    "rms_norm": Tolerance(floor_roundings=2.0),
    "rope": Tolerance(),
    "scale": Tolerance(),
    "softcap": Tolerance(floor_roundings=3.0, why="plain tanh is correctly rounded; the polynomial has 2e-7"),
    "gpu bfloat16": Tolerance(),
    "gpu float32": Tolerance(
        floor_roundings=288.0,
        why="matrix units add 16 products at a time and cut the sum off, always towards zero: 4608 columns are 288",
    ),
}
