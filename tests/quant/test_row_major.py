"""Strips as rows: by hand, and the same values as the format's own, exactly."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast.errors import WeightsError
from gemma2_fast.quant import FORMATS
from gemma2_fast.quant.row_major import RowMajor, row_major
from gemma2_fast.weights.tensor import Tensor

Floats = NDArray[np.float32]


def stored(name: str, rows: int, cols: int) -> Tensor:
    """Groups whose scales and factors differ widely, and of both signs."""
    rng = np.random.default_rng(rows * cols)
    values = rng.standard_normal((rows, cols), np.float32)
    values *= np.exp2(rng.integers(-4, 1, (rows, -(-cols // 32)))).repeat(32, axis=1)[:, :cols].astype(np.float32)
    return Tensor.from_float32(values, FORMATS[name])


def repacked(tensor: Tensor) -> RowMajor:
    rows, cols = tensor.shape
    return row_major(tensor.format, tensor.data, (rows, cols))


def value(matrix: RowMajor, row: int, column: int) -> float:
    """One weight, as weight_formats.py describes it."""
    group, place = divmod(column, 128)
    scale = (np.uint32(matrix.scales[row, group]) << np.uint32(16)).view(np.float32)
    if matrix.factors is None:
        return float(scale) * int(matrix.codes[row, column])
    high, byte = divmod(place, 64)
    code = (int(matrix.codes[row, group, byte]) >> 4 * high) & 15
    factor = (int(matrix.factors[row, group, byte // 32]) >> 4 * high) & 15
    return float(scale) * (factor - 8) * (code - 8)


def test_int8_by_hand() -> None:
    values = np.zeros((65, 129), np.float32)
    values[0, 0], values[64, 127], values[64, 128] = 127, -127, 254
    matrix = repacked(Tensor.from_float32(values, FORMATS["INT8_G128"]))
    assert (matrix.codes.shape, matrix.codes.dtype, matrix.scales.shape) == ((65, 129), np.int8, (65, 2))
    assert (matrix.codes[0, 0], matrix.codes[64, 127], matrix.codes[64, 128]) == (127, -127, 127)
    assert np.count_nonzero(matrix.codes) == 3
    assert (matrix.scales[0, 0], matrix.scales[64, 0], matrix.scales[64, 1]) == (0x3F80, 0x3F80, 0x4000)
    assert matrix.factors is None


def test_int4_by_hand() -> None:
    values = np.zeros((65, 130), np.float32)
    values[64, 1], values[64, 65], values[64, 100], values[64, 129] = -8, -16, -64, -8
    matrix = repacked(Tensor.from_float32(values, FORMATS["INT4_G32"]))
    assert matrix.factors is not None
    assert (matrix.codes.shape, matrix.factors.shape, matrix.scales.shape) == ((65, 2, 64), (65, 2, 2), (65, 2))
    # The group's scale is -1; factors of columns 0 to 31, 64 to 95 and 96 to 127 are -1, -2 and -8, codes 8 - 8 = 0.
    assert matrix.codes[64, 0, [1, 36]].tolist() == [0x00, 0x08]
    assert (np.delete(matrix.codes[64, 0], [1, 36]) == 0x88).all()
    assert matrix.factors[64, 0].tolist() == [0x67, 0x08]
    assert [value(matrix, 64, column) for column in (1, 65, 100, 129, 2)] == [-8, -16, -64, -8, 0]


@pytest.mark.parametrize("name", ["INT8_G128", "INT4_G32"])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (64, 128), (65, 129), (130, 300)])
def test_values_are_the_formats(name: str, rows: int, cols: int) -> None:
    tensor = stored(name, rows, cols)
    matrix = repacked(tensor)
    ours = [[value(matrix, row, column) for column in range(cols)] for row in range(rows)]
    np.testing.assert_array_equal(np.array(ours, np.float32), tensor.to_float32())


def test_other_formats_are_refused() -> None:
    tensor = Tensor.from_float32(np.zeros((2, 32), np.float32), FORMATS["Q8_0"])
    with pytest.raises(WeightsError, match="Q8_0 has no row-major form: expected INT8_G128 or INT4_G32"):
        repacked(tensor)
