"""INT4_G128 and INT4_G32: strips of 64 rows, a bfloat16 scale for a group of a row; weight = scale (code - 8).

A block holds nibbles [group / 4][2][16][4], then the 64 scales. Of byte [k / 4][half][lane][k % 4] the low nibble
belongs to row 32 half + lane, the high one to row 32 half + 16 + lane.
"""

from __future__ import annotations

import numpy as np

from gemma2_fast.quant.bf16 import rounded
from gemma2_fast.quant.fields import inverse
from gemma2_fast.quant.format import Bytes, Floats, Format
from gemma2_fast.quant.strips import STRIP_ROWS, in_fours, in_rows, scale_bytes, scales_of, strip_format

# The weight of largest magnitude becomes about -divisor of the codes -8..7. Divisors above 8, which clip it, lower the
# squared error further but cost likelihood. Of equally good ones the first is taken: weights that are codes stay exact.
SCALE_DIVISORS = (8.0, 7.0, 7.5)
# Sums run over so many lanes, which are then folded in halves: an order that any width of vector can follow.
SUM_LANES = 16


def _sums(terms: Floats) -> Floats:
    """Sums of [..., W] over W in the order that is part of the format's definition, [..., 1]."""
    lanes = terms.reshape(*terms.shape[:-1], -1, SUM_LANES)
    total = lanes[..., 0, :].copy()
    for i in range(1, lanes.shape[-2]):
        total += lanes[..., i, :]
    while total.shape[-1] > 1:
        middle = total.shape[-1] // 2
        total = total[..., :middle] + total[..., middle:]
    return total


def _stored(scales: Floats) -> Floats:
    """As bfloat16; zeros lose their sign."""
    return rounded(scales) + np.float32(0)


def _steps(weights: Floats, scales: Floats) -> Floats:
    """The codes -8..7."""
    steps: Floats = np.clip(np.rint(weights * inverse(scales)), -8, 7)
    return steps


def _best_scales(weights: Floats) -> Floats:
    """Of the scales that SCALE_DIVISORS give, and the least-squares fit to the codes of the best, the one of least
    squared error; [N, 64, 1]."""
    high, low = weights.max(axis=2, keepdims=True), weights.min(axis=2, keepdims=True)
    largest = np.where(high >= -low, high, low)

    def error_of(scales: Floats) -> Floats:
        difference = weights - scales * _steps(weights, scales)
        return _sums(difference * difference)

    best = _stored(largest * np.float32(-1 / SCALE_DIVISORS[0]))
    least = error_of(best)
    for divisor in SCALE_DIVISORS[1:]:
        scales = _stored(largest * np.float32(-1 / divisor))
        error = error_of(scales)
        best, least = np.where(error < least, scales, best), np.where(error < least, error, least)
    steps = _steps(weights, best)
    fitted = _stored(_sums(weights * steps) / _sums(steps * steps))
    return np.where(error_of(fitted) < least, fitted, best)


def _packed_nibbles(codes: Bytes) -> Bytes:
    """Codes [N, W / 4, 64, 4] as bytes [N, W * 32]."""
    halves = codes.reshape(len(codes), -1, 2, 2, 16, 4)
    return (halves[:, :, :, 0] | halves[:, :, :, 1] << np.uint8(4)).reshape(len(codes), -1)


def _int4(name: str, group: int) -> Format:
    code_bytes = group * STRIP_ROWS // 2

    def unpack(blocks: Bytes) -> Floats:
        packed = blocks[:, :code_bytes].reshape(len(blocks), group // 4, 2, 16, 4)
        codes = np.stack([packed & 15, packed >> 4], axis=3).reshape(len(blocks), group // 4, STRIP_ROWS, 4)
        return (in_rows(codes).view(np.int8) - np.int8(8)) * scales_of(blocks)

    def pack(weights: Floats) -> Bytes:
        scales = _best_scales(weights)
        codes = (_steps(weights, scales) + np.float32(8)).astype(np.uint8)
        return np.concatenate([_packed_nibbles(in_fours(codes)), scale_bytes(scales)], axis=1)

    return strip_format(name, group, code_bytes, unpack, pack)


INT4_G128 = _int4("INT4_G128", 128)
INT4_G32 = _int4("INT4_G32", 32)
