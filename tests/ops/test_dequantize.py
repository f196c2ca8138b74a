"""dequantize_row gives, on every instruction set, exactly the float32 weights that gemma2_fast.quant unpacks."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma2_fast import _core
from gemma2_fast.errors import Gemma2FastError, RequestError
from gemma2_fast.quant import FORMATS
from tests.ops.stored_weights import (
    HALF_OFFSETS,
    ROWS_OF_ANY_LENGTH,
    STRIP_FORMATS,
    stored_matrix,
    unpacked,
)


def half_bytes(*values: float) -> list[int]:
    return list(np.array(values, dtype=np.float16).tobytes())


def test_q4_0_block_by_hand(ops: _core.Ops) -> None:
    # d = 0.5; byte i holds code i low and code 15 - i high, so weight i = (i - 8) / 2 and weight 16 + i = (7 - i) / 2.
    block = np.array(half_bytes(0.5) + [i | (15 - i) << 4 for i in range(16)], dtype=np.uint8)
    weights = ops.dequantize_row("Q4_0", block, 32)
    assert weights.tolist() == [(i - 8) / 2 for i in range(16)] + [(7 - i) / 2 for i in range(16)]


def test_q8_0_block_by_hand(ops: _core.Ops) -> None:
    codes = np.array([-128, 127, 0, 1] * 8, dtype=np.int8)
    block = np.concatenate([np.array(half_bytes(-0.25), dtype=np.uint8), codes.view(np.uint8)])
    assert ops.dequantize_row("Q8_0", block, 32).tolist() == [32.0, -31.75, 0.0, -0.25] * 8


@pytest.mark.parametrize("name", FORMATS)
def test_equals_numpy(ops: _core.Ops, name: str) -> None:
    cols = 67 if name in ROWS_OF_ANY_LENGTH else 64 * FORMATS[name].block_weights
    data = stored_matrix(name, 1, cols, seed=1)
    np.testing.assert_array_equal(ops.dequantize_row(name, data, cols), unpacked(name, data, 1, cols)[0])


@pytest.mark.parametrize("name", STRIP_FORMATS)
def test_every_row_of_strips(ops: _core.Ops, name: str) -> None:
    rows, cols = 131, 300  # a last strip and a last block that are not full
    data = stored_matrix(name, rows, cols, seed=2)
    expected = unpacked(name, data, rows, cols)
    for row in range(rows):
        np.testing.assert_array_equal(ops.dequantize_row(name, data, cols, rows, row), expected[row])
    with pytest.raises(RequestError, match=r"row: expected 0\.\.130, got 131"):
        ops.dequantize_row(name, data, cols, rows, rows)


def test_strips_by_hand(ops: _core.Ops) -> None:
    # Of int8, column 6 is byte 2 of the second four; of int4, row 49 is the high nibble of lane 1 in the second half.
    int8 = np.full((32, 64, 4), 128, np.uint8)
    int8[1, 49, 2] = 131
    int4 = np.full((32, 2, 16, 4), 0x88, np.uint8)
    int4[1, 1, 1, 2] = int4[31, 1, 1, 3] = 0xB8
    factors = np.full((2, 64), 0x88, np.uint8)
    factors[0, 49], factors[1, 49] = 0x89, 0x18  # 1 for columns 0 to 31, -7 for 96 to 127
    half = np.full(64, 0x3F00, np.uint16).view(np.uint8)  # 0.5 in bfloat16
    row = ops.dequantize_row("INT8_G128", np.concatenate([int8.ravel(), half]), 128, 64, 49)
    assert (np.flatnonzero(row).tolist(), row[6]) == ([6], 1.5)
    row = ops.dequantize_row("INT4_G32", np.concatenate([int4.ravel(), factors.ravel(), half]), 128, 64, 49)
    assert (np.flatnonzero(row).tolist(), row[6], row[127]) == ([6, 127], 1.5, -10.5)


@pytest.mark.parametrize("name", ROWS_OF_ANY_LENGTH)
@pytest.mark.parametrize("cols", [1, 7, 8, 9, 15, 16, 17, 31])
def test_short_rows(ops: _core.Ops, name: str, cols: int) -> None:
    data = stored_matrix(name, 1, cols, seed=cols)
    np.testing.assert_array_equal(ops.dequantize_row(name, data, cols), unpacked(name, data, 1, cols)[0])


def test_every_half_value(ops: _core.Ops) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    actual = ops.dequantize_row("F16", halves.view(np.uint8), 1 << 16)
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[numbers]), np.signbit(expected[numbers]))


@pytest.mark.parametrize("name", HALF_OFFSETS)
@pytest.mark.parametrize("scale", [0.0, 2.0**-24, -(2.0**-15), 65504.0], ids=["zero", "subnormal", "tiny", "largest"])
def test_extreme_scales(ops: _core.Ops, name: str, scale: float) -> None:
    cols = 8 * FORMATS[name].block_weights
    data = stored_matrix(name, 1, cols, seed=3)
    blocks = data.reshape(8, -1)
    for offset in HALF_OFFSETS[name]:
        blocks[:, offset : offset + 2] = half_bytes(scale)
    np.testing.assert_array_equal(ops.dequantize_row(name, data, cols), unpacked(name, data, 1, cols)[0])


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in STRIP_FORMATS])
def test_equals_gguf_package(ops: _core.Ops, name: str) -> None:
    gguf = pytest.importorskip("gguf")
    cols = 4 * FORMATS[name].block_weights
    data = np.ascontiguousarray(stored_matrix(name, 1, cols, seed=4))
    expected = gguf.quants.dequantize(typed(name, data), gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(ops.dequantize_row(name, data, cols), np.asarray(expected, dtype=np.float32).ravel())


def typed(name: str, data: NDArray[np.uint8]) -> NDArray[np.generic]:
    """As the gguf package takes it: floats as such, everything else as bytes."""
    return data.view({"F32": np.float32, "F16": np.float16}.get(name, np.uint8))


@pytest.mark.parametrize("name", HALF_OFFSETS)
@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.99])
def test_a_changed_byte_shows(ops: _core.Ops, name: str, position: float) -> None:
    """The comparison with numpy can fail wherever a byte of the block is misread."""
    stored = FORMATS[name]
    data = stored_matrix(name, 1, stored.block_weights, seed=5)
    expected = unpacked(name, data, 1, stored.block_weights)[0]
    data[int(position * stored.block_bytes)] ^= 0x11
    assert not np.array_equal(ops.dequantize_row(name, data, stored.block_weights), expected)


def test_refusals(ops: _core.Ops) -> None:
    with pytest.raises(Gemma2FastError, match=r"'Q3_X'.*F32, F16, BF16, Q8_0"):
        ops.dequantize_row("Q3_X", np.zeros(34, np.uint8), 32)
    with pytest.raises(RequestError, match="multiple of 32"):
        ops.dequantize_row("Q8_0", np.zeros(34, np.uint8), 33)
    with pytest.raises(RequestError, match="expected 34 bytes, got 33"):
        ops.dequantize_row("Q8_0", np.zeros(33, np.uint8), 32)
