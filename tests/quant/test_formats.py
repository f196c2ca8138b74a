"""Every storage format: values by hand, equality with the gguf package on random bytes, round trips, bad input."""

from __future__ import annotations

import dataclasses

import gguf
import numpy as np
import pytest

from gemma2_fast.errors import FileFormatError, WeightsError
from gemma2_fast.quant import FORMAT_BY_GGUF_TYPE, FORMATS, Format
from gemma2_fast.quant.fields import CHUNK_WEIGHTS
from gemma2_fast.weights.tensor import Tensor

GGUF = [name for name, format in FORMATS.items() if format.gguf_type is not None]
PACKED = [name for name in GGUF if FORMATS[name].pack is not None]
HALF_OF_1, HALF_OF_2, HALF_OF_MINUS_HALF = b"\x00\x3c", b"\x00\x40", b"\x00\xb8"


def block(name: str, fields: dict[int, bytes]) -> np.ndarray:
    """One block of zeros but for `fields`, by their byte offset."""
    raw = bytearray(FORMATS[name].block_bytes)
    for offset, value in fields.items():
        raw[offset : offset + len(value)] = value
    return np.frombuffer(bytes(raw), dtype=np.uint8)[None]


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("F32", {0: b"\x00\x00\x20\xc1"}, {0: -10.0}),
        ("F16", {0: HALF_OF_MINUS_HALF}, {0: -0.5}),
        ("BF16", {0: b"\x80\x3f"}, {0: 1.0}),
        ("Q8_0", {0: HALF_OF_MINUS_HALF, 2: b"\x01\xfe", 33: b"\x80"}, {0: -0.5, 1: 1.0, 2: 0.0, 31: 64.0}),
        ("Q4_0", {0: HALF_OF_2, 2: b"\xf0", 17: b"\x98"}, {0: -16.0, 16: 14.0, 1: -16.0, 15: 0.0, 31: 2.0}),
        ("Q4_1", {0: HALF_OF_2, 2: HALF_OF_1, 4: b"\xf0", 19: b"\x12"}, {0: 1.0, 16: 31.0, 15: 5.0, 31: 3.0}),
        # Bits 0 and 17 of the fifth bits add 16 to codes 0 and 17.
        ("Q5_0", {0: HALF_OF_2, 2: b"\x01\x00\x02\x00", 6: b"\x31"}, {0: 2.0, 16: -26.0, 17: 0.0, 1: -32.0}),
        (
            "Q5_1",
            {0: HALF_OF_2, 2: HALF_OF_1, 4: b"\x01\x00\x02\x00", 8: b"\x31"},
            {0: 35.0, 16: 7.0, 17: 33.0, 1: 1.0},
        ),
        # Group 0: scale 3, min 2. Group 4: scale 1 + 16 * 3 = 49, min 2 + 16 * 1 = 18. Group 1: scale 7, min 0.
        (
            "Q4_K",
            {0: HALF_OF_1, 2: HALF_OF_2, 4: b"\xc3\x07", 8: b"\x42", 12: b"\x21", 16: b"\x95", 80: b"\x04"},
            {0: 3 * 5 - 2 * 2.0, 1: -4.0, 32: 63.0, 128: 49 * 4 - 2 * 18.0, 129: -36.0, 160: 0.0},
        ),
        # Byte 0 of the fifth bits: bit 0 adds 16 to weight 0 of group 0, bit 4 to weight 0 of group 4.
        (
            "Q5_K",
            {
                0: HALF_OF_1,
                2: HALF_OF_2,
                4: b"\xc3\x07",
                8: b"\x42",
                12: b"\x21",
                16: b"\x11",
                48: b"\x95",
                112: b"\x04",
            },
            {0: 3 * 21 - 2 * 2.0, 1: -4.0, 32: 63.0, 128: 49 * 20 - 2 * 18.0, 129: -36.0, 160: 0.0},
        ),
        # Weight 0: code 3 + 16, scale 2. Weight 64: code 5 + 16 * 2, scale -1. Weight 224: code 0, scale 1.
        (
            "Q6_K",
            {0: b"\x53", 128: b"\x21", 192: b"\x02\x00\x00\x00\xff", 206: b"\x01", 208: HALF_OF_1},
            {0: (19 - 32) * 2.0, 1: -64.0, 64: -(5 + 32 - 32.0), 65: 32.0, 224: -32.0, 240: 0.0},
        ),
    ],
)
def test_values_by_hand(name: str, fields: dict[int, bytes], expected: dict[int, float]) -> None:
    weights = FORMATS[name].unpack(block(name, fields))
    assert weights.dtype == np.float32
    assert weights.shape == (1, FORMATS[name].block_weights)
    assert {index: weights[0, index].item() for index in expected} == expected


@pytest.mark.parametrize("name", GGUF)
def test_unpacks_random_bytes_as_gguf_does(name: str) -> None:
    # Random scales include NaN, infinities and subnormals; more blocks than a chunk, and a last chunk that is short.
    format = FORMATS[name]
    num_blocks = CHUNK_WEIGHTS // format.block_weights + 37
    blocks = np.random.default_rng(1).integers(0, 256, (num_blocks, format.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(blocks.copy(), gguf.GGMLQuantizationType[name])
    assert np.array_equal(format.unpack(blocks), expected, equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_unpacks_unaligned_read_only_views(name: str) -> None:
    format = FORMATS[name]
    raw = np.random.default_rng(2).integers(0, 256, 1 + 5 * format.block_bytes, dtype=np.uint8)
    raw.flags.writeable = False
    blocks = raw[1:].reshape(5, format.block_bytes)
    assert np.array_equal(format.unpack(blocks), format.unpack(blocks.copy()), equal_nan=True)


@pytest.mark.parametrize("name", FORMATS)
def test_takes_no_blocks(name: str) -> None:
    format = FORMATS[name]
    shape = (0, format.block_rows * format.block_weights)
    assert format.unpack(np.empty((0, format.block_bytes), np.uint8)).shape == shape


def weights_for_packing(block_weights: int) -> np.ndarray:
    """Ordinary weights and blocks of zeros, of ties, of negative zeros, of tiny values."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((CHUNK_WEIGHTS // 32 + 9, 32), dtype=np.float32) * np.float32(0.02)
    rows[1] = 0
    rows[2] = -0.0
    rows[3] = rng.integers(-3, 4, 32)
    rows[4] = np.arange(32) - 15.5
    rows[5] *= np.float32(1e-9)
    rows[6] = 1.0
    rows[7] = np.arange(32) - 15.5
    rows[7, 0] = 127  # makes the scale of Q8_0 one, and every other code a tie
    return rows.reshape(-1, block_weights)


@pytest.mark.parametrize("name", PACKED)
def test_packs_as_gguf_does(name: str) -> None:
    format = FORMATS[name]
    assert format.pack is not None
    weights = weights_for_packing(format.block_weights)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(weights.copy(), gguf.GGMLQuantizationType[name])
    packed = format.pack(weights)
    assert packed.dtype == np.uint8
    assert np.array_equal(packed, expected.view(np.uint8).reshape(packed.shape))


# The last code of an asymmetric range is one step from the end: -8 d is exact, +8 d must become +7 d.
STEPS_OF_ERROR = {"Q8_0": (127, 0.51), "Q4_0": (8, 1.01), "Q4_1": (7.5, 0.51), "Q5_0": (16, 1.01), "Q5_1": (15.5, 0.51)}


@pytest.mark.parametrize("name", STEPS_OF_ERROR)
def test_packing_loses_at_most_a_step(name: str) -> None:
    format = FORMATS[name]
    assert format.pack is not None
    weights = np.random.default_rng(4).standard_normal((500, 32), dtype=np.float32)
    largest = np.abs(weights).max(axis=1, keepdims=True)
    codes, steps = STEPS_OF_ERROR[name]
    error = np.abs(format.unpack(format.pack(weights)) - weights)
    assert (error <= steps * largest / codes + 1e-3 * largest).all()  # 1e-3: scale and minimum are halves


@pytest.mark.parametrize("name", PACKED)
def test_weights_that_are_codes_come_back_exactly(name: str) -> None:
    format = FORMATS[name]
    assert format.pack is not None
    codes = np.arange(-16, 16) // 2 if name.startswith("Q4") else np.arange(-16, 16)
    if name == "Q8_0":
        codes[0] = 127
    weights = (codes / 4).astype(np.float32).reshape(-1, format.block_weights)
    assert np.array_equal(format.unpack(format.pack(weights)), weights)


def bfloat16_bits(*float32_bits: int) -> list[int]:
    weights = np.array(float32_bits, dtype=np.uint32).view(np.float32)[:, None]
    pack = FORMATS["BF16"].pack
    assert pack is not None
    return pack(weights).view("<u2")[:, 0].tolist()


def test_bfloat16_rounds_to_nearest_even() -> None:
    assert bfloat16_bits(0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF) == [0x3F80, 0x3F82, 0x3F81, 0x3F81]
    assert bfloat16_bits(0x7F7FFFFF, 0x00008001, 0x80000000) == [0x7F80, 0x0001, 0x8000]


def test_bfloat16_keeps_infinities_and_quiets_nan() -> None:
    assert bfloat16_bits(0x7F800000, 0xFF800000) == [0x7F80, 0xFF80]
    # The first would round to infinity, the third to negative zero, if their payloads took part in rounding.
    assert bfloat16_bits(0x7F800001, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF) == [0x7FC0, 0xFFC0, 0x7FFF, 0xFFFF]


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_keep_nan_and_infinity(name: str) -> None:
    format = FORMATS[name]
    assert format.pack is not None
    weights = np.array([[np.inf], [-np.inf], [np.nan], [-0.0]], dtype=np.float32)
    back = format.unpack(format.pack(weights))
    assert np.array_equal(back, weights, equal_nan=True)
    assert np.signbit(back[3, 0])


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_quantising_refuses_what_has_no_scale(name: str, bad: float) -> None:
    weights = np.ones((3, 32), dtype=np.float32)
    weights[1, 5] = bad
    pack = FORMATS[name].pack
    assert pack is not None
    with pytest.raises(WeightsError, match=f"as {name}: a block is not finite or its scale exceeds 65504"):
        pack(weights)


def test_float16_refuses_to_overflow() -> None:
    pack = FORMATS["F16"].pack
    assert pack is not None
    with pytest.raises(WeightsError, match="as F16: a value exceeds 65504"):
        pack(np.array([[1e5]], dtype=np.float32))


def test_tables_agree_with_gguf() -> None:
    assert GGUF == ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
    for name, format in ((name, FORMATS[name]) for name in GGUF):
        kind = gguf.GGMLQuantizationType[name]
        assert format.name == name
        assert (format.gguf_type, (format.block_weights, format.block_bytes)) == (kind, gguf.GGML_QUANT_SIZES[kind])
        assert FORMAT_BY_GGUF_TYPE[int(kind)] is format


def test_rows_must_fill_their_blocks() -> None:
    assert FORMATS["Q4_K"].row_bytes(512) == 288
    assert FORMATS["Q4_K"].row_bytes(0) == 0
    assert FORMATS["Q4_K"].bits_per_weight == 4.5
    with pytest.raises(FileFormatError, match="640 weights cannot be stored as Q4_K: its blocks hold 256"):
        FORMATS["Q4_K"].row_bytes(640)


def test_a_format_may_end_its_rows_with_a_short_group() -> None:
    # Signed bytes and one float32 scale a group of 128; a row of 300 weights takes three groups, 84 weights unused.
    def unpack(blocks: np.ndarray) -> np.ndarray:
        return blocks[:, 4:].view(np.int8) * np.ascontiguousarray(blocks[:, :4]).view("<f4")

    grouped = Format("INT8", 128, 132, gguf_type=None, unpack=unpack, last_block_may_be_short=True)
    assert [grouped.row_bytes(cols) for cols in (0, 1, 128, 129, 300)] == [0, 132, 132, 264, 396]
    assert grouped.bits_per_weight == 8.25
    with pytest.raises(FileFormatError, match="300 weights"):
        dataclasses.replace(grouped, last_block_may_be_short=False).row_bytes(300)

    blocks = np.zeros((2, 3, 132), dtype=np.uint8)
    blocks[:, :, :4] = np.array([0.5], dtype="<f4").view(np.uint8)
    blocks[0, 2, 4 + 43], blocks[0, 2, 4 + 44], blocks[1, 0, 4] = 6, 99, 8
    weights = Tensor((2, 300), grouped, blocks.reshape(-1)).to_float32()
    assert weights.shape == (2, 300)
    assert (weights[0, 299], weights[1, 0], np.abs(weights).sum()) == (3.0, 4.0, 7.0)


@pytest.mark.parametrize("shape", [(), (1,), (3, 4), (0, 5), (5, 0), (2, 0, 3)])
def test_tensor_of_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    values = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    tensor = Tensor.from_float32(values)
    assert tensor.num_bytes == values.nbytes
    assert np.array_equal(tensor.to_float32(), values)
    assert tensor.to_float32().shape == shape
