"""What the sampler does with numbers, as csrc/runtime does it: the same weights and draws, bit for bit.

That needs division as IEEE has it and no contraction of a product and a sum, so kernels that use this file are compiled
without it.
"""

from __future__ import annotations

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
LARGEST_FLOAT = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _split_exponential(x):
    """exp(x) = power * (1 + rest), for |x| <= 87: the series of row_math.h."""
    shifted = x * 1.44269504 + 12582912.0  # 1.5 * 2^23: the nearest integer is in the low bits
    n = shifted - 12582912.0
    r = (x - n * 0.693145752) - n * 1.42860677e-6
    p = r * 0.00019841270113829523 + 0.0013888889225199819
    p = p * r + 0.008333333767950535
    p = p * r + 0.0416666679084301
    p = p * r + 0.1666666716337204
    p = p * r + 0.5
    p = p * r + 1.0
    power = (0x3F800000 + (shifted.to(tl.int32, bitcast=True) << 23)).to(tl.float32, bitcast=True)
    return power, p * r


@triton.jit
def _exp(x):
    """exp(x) for x <= 87; 0 below -87."""
    power, rest = _split_exponential(tl.maximum(x, -87.0))
    return tl.where(x > -87.0, power * (rest + 1.0), 0.0)


@triton.jit
def _capped(x, cap):
    """cap * tanh(x / cap); minus infinity stays."""
    ratio = tl.div_rn(x, cap)
    power, rest = _split_exponential(tl.minimum(tl.abs(ratio) * 2.0, 20.0))
    t = power * rest + (power - 1.0)
    capped = tl.div_rn(t, t + 2.0) * cap
    return tl.where(x < -LARGEST_FLOAT, x, tl.where(ratio < 0, -capped, capped))


@triton.jit
def weights_of(logits, largest, temperature, cap, CAPPED: tl.constexpr):
    """exp((value - largest value) / temperature), a value being the logit after the cap."""
    if CAPPED:
        logits = _capped(logits, cap)
        largest = _capped(largest, cap)
    return _exp(tl.div_rn(logits - largest, temperature))


@triton.jit
def _mixed(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform_draw(seed, token_index):
    """A float64 in [0, 1), from two numbers taken as unsigned of 64 bits."""
    of_seed = _mixed(seed.to(tl.uint64, bitcast=True) + GOLDEN)
    bits = _mixed(of_seed + (token_index.to(tl.uint64) + 1) * GOLDEN)
    return (bits >> 11).to(tl.float64) * 1.1102230246251565e-16  # 2^-53
