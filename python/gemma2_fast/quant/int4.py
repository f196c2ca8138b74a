"""INT4_G32: strips of 64 rows; 128 weights of a row share a bfloat16 scale, and each 32 of them a factor -8..7.

weight = scale factor (code - 8), so that factor (code - 8) is an integer of a byte. A block holds nibbles
[32][2][16][4], factors [2][64], then the 64 scales. Of byte [k / 4][half][lane][k % 4] the low nibble is the code of
row 32 half + lane, the high one that of row 32 half + 16 + lane. Of byte [i][row] the low nibble is factor + 8 of
columns 64 i to 64 i + 31, the high one that of the next 32.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gemma2_fast.quant.bf16 import rounded
from gemma2_fast.quant.fields import inverse
from gemma2_fast.quant.format import Bytes, Floats
from gemma2_fast.quant.strips import STRIP_ROWS, in_fours, in_rows, scale_bytes, scales_of, strip_format

# The weight of largest magnitude becomes about -divisor of the codes -8..7. Divisors above 8, which clip it, lower the
# squared error further but cost likelihood. Of equally good ones the first is taken: weights that are codes stay exact.
SCALE_DIVISORS = (8.0, 7.0, 7.5)
# The same for the largest of four groups' scales and its factor.
FACTOR_DIVISORS = (8.0, 7.0, 6.0, 5.0, 4.0)

_GROUP, _GROUPS = 32, 4
_WEIGHTS = _GROUP * _GROUPS
_NIBBLE_BYTES = _WEIGHTS * STRIP_ROWS // 2
_FACTOR_BYTES = _GROUPS * STRIP_ROWS // 2
# Sums run over so many lanes, which are then folded in halves: an order that any width of vector can follow.
_SUM_LANES = 16


def _folded(lanes: Floats) -> Floats:
    """Sums of [..., L], each half of the lanes added to the other, [..., 1]."""
    while lanes.shape[-1] > 1:
        middle = lanes.shape[-1] // 2
        lanes = lanes[..., :middle] + lanes[..., middle:]
    return lanes


def _sums(terms: Floats) -> Floats:
    """Sums of [..., W] over W in the order that is part of the format's definition, [..., 1]."""
    lanes = terms.reshape(*terms.shape[:-1], -1, _SUM_LANES)
    total = lanes[..., 0, :].copy()
    for i in range(1, lanes.shape[-2]):
        total += lanes[..., i, :]
    return _folded(total)


def _stored(scales: Floats) -> Floats:
    """As bfloat16; zeros lose their sign."""
    return rounded(scales) + np.float32(0)


def _steps(values: Floats, scales: Floats) -> Floats:
    """The nearest integers -8..7 that a scale has for values."""
    steps: Floats = np.clip(np.rint(values * inverse(scales)), -8, 7)
    return steps


def _fit(weights: Floats, integers: Floats) -> Floats:
    """The scale of least squared error for weights that become these integers."""
    fit: Floats = _sums(weights * integers) / _sums(integers * integers)
    return fit


def own_scales(weights: Floats) -> Floats:
    """Of the scales that SCALE_DIVISORS give, and the least-squares fit to the codes of the best, the one of least
    squared error; [..., 1], not yet rounded."""
    high, low = weights.max(axis=-1, keepdims=True), weights.min(axis=-1, keepdims=True)
    largest = np.where(high >= -low, high, low)

    def error_of(scales: Floats) -> Floats:
        difference = weights - scales * _steps(weights, scales)
        return _sums(difference * difference)

    best = largest * np.float32(-1 / SCALE_DIVISORS[0])
    least = error_of(best)
    for divisor in SCALE_DIVISORS[1:]:
        scales = largest * np.float32(-1 / divisor)
        error = error_of(scales)
        best, least = np.where(error < least, scales, best), np.where(error < least, error, least)
    fitted = _fit(weights, _steps(weights, best))
    return np.where(error_of(fitted) < least, fitted, best)


def factors_of(group_scales: Floats, scales: Floats) -> Floats:
    """0 only where that is exact: the codes of a scale much smaller than another still have their bits."""
    factors = _steps(group_scales, scales)
    return np.where((factors == 0) & (group_scales != 0), np.float32(1), factors)


def common_scales(group_scales: Floats) -> Floats:
    """Of the scales that FACTOR_DIVISORS give, the one whose multiples are nearest to those of the groups [..., 4]."""
    largest = np.take_along_axis(group_scales, np.abs(group_scales).argmax(axis=-1, keepdims=True), axis=-1)

    def error_of(scales: Floats) -> Floats:
        difference = group_scales - scales * factors_of(group_scales, scales)
        return _folded(difference * difference)

    best = _stored(largest * np.float32(-1 / FACTOR_DIVISORS[0]))
    least = error_of(best)
    for divisor in FACTOR_DIVISORS[1:]:
        scales = _stored(largest * np.float32(-1 / divisor))
        error = error_of(scales)
        best, least = np.where(error < least, scales, best), np.where(error < least, error, least)
    return best


def _spread(factors: Floats) -> Floats:
    """[..., 4] as those of 128 weights."""
    return np.repeat(factors, _GROUP, axis=-1)


def _packed_nibbles(codes: Bytes) -> Bytes:
    """Codes [N, 32, 64, 4] as bytes [N, 4096]."""
    halves = codes.reshape(len(codes), -1, 2, 2, 16, 4)
    return (halves[:, :, :, 0] | halves[:, :, :, 1] << np.uint8(4)).reshape(len(codes), -1)


def _packed_factors(factors: Bytes) -> Bytes:
    """[N, 64, 4] as bytes [N, 128]."""
    by_group = factors.swapaxes(1, 2)
    return (by_group[:, 0::2] | by_group[:, 1::2] << np.uint8(4)).reshape(len(factors), -1)


def _centred(nibbles: Bytes) -> NDArray[np.int8]:
    return nibbles.view(np.int8) - np.int8(8)


def stored_codes(blocks: Bytes) -> Bytes:
    """[N, 64, 128], a code 0..15 a byte."""
    packed = blocks[:, :_NIBBLE_BYTES].reshape(len(blocks), -1, 2, 16, 4)
    return in_rows(np.stack([packed & 15, packed >> 4], axis=3).reshape(len(blocks), -1, STRIP_ROWS, 4))


def stored_factors(blocks: Bytes) -> Bytes:
    """factor + 8 of each 32 columns, [N, 64, 4], a byte each."""
    pairs = blocks[:, _NIBBLE_BYTES : _NIBBLE_BYTES + _FACTOR_BYTES].reshape(len(blocks), 2, STRIP_ROWS)
    return np.stack([pairs & 15, pairs >> 4], axis=2).reshape(len(blocks), _GROUPS, STRIP_ROWS).swapaxes(1, 2)


def _unpack(blocks: Bytes) -> Floats:
    factors = np.repeat(_centred(stored_factors(blocks)), _GROUP, axis=2)
    return _centred(stored_codes(blocks)) * factors * scales_of(blocks)


def _pack(weights: Floats) -> Bytes:
    """Groups find their scales alone; then a scale and four factors come near to those, and codes are made by them."""
    group_scales = own_scales(weights.reshape(*weights.shape[:2], _GROUPS, _GROUP))[..., 0]
    scales = common_scales(group_scales)
    factors = factors_of(group_scales, scales)
    codes = (_steps(weights, _spread(scales * factors)) + np.float32(8)).astype(np.uint8)
    return np.concatenate(
        [
            _packed_nibbles(in_fours(codes)),
            _packed_factors((factors + np.float32(8)).astype(np.uint8)),
            scale_bytes(scales),
        ],
        axis=1,
    )


INT4_G32 = strip_format("INT4_G32", _WEIGHTS, _NIBBLE_BYTES + _FACTOR_BYTES, _unpack, _pack)
