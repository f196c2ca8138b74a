"""INT8 and INT4 strips: values by hand, what packing promises, and C++ equal to numpy bit for bit."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from gemma2_fast import _core
from gemma2_fast.errors import Gemma2FastError, RequestError, WeightsError
from gemma2_fast.quant import FORMATS
from gemma2_fast.quant.int4 import FACTOR_DIVISORS, SCALE_DIVISORS, common_scales, own_scales
from gemma2_fast.weights.tensor import Tensor

STRIPS = ["INT8_G128", "INT4_G32"]
BFLOAT_OF_HALF, BFLOAT_OF_MINUS_2 = b"\x00\x3f", b"\x00\xc0"


def test_int8_values_by_hand() -> None:
    block = np.full(8320, 128, dtype=np.uint8)
    block[8192:] = 0
    block[8192:8194] = list(BFLOAT_OF_HALF)  # row 0
    block[8318:8320] = list(BFLOAT_OF_MINUS_2)  # row 63
    block[0] = 129  # codes[0][0][0]: row 0, column 0
    block[31 * 256 + 3] = 1  # codes[31][0][3]: row 0, column 127
    block[1 * 256 + 63 * 4 + 2] = 255  # codes[1][63][2]: row 63, column 6
    weights = Tensor((64, 128), FORMATS["INT8_G128"], block).to_float32()
    assert (weights[0, 0], weights[0, 127], weights[63, 6]) == (0.5, -63.5, -254.0)
    assert np.count_nonzero(weights) == 3


def test_int4_values_by_hand() -> None:
    block = np.full(4352, 0x88, dtype=np.uint8)
    block[4224:] = 0
    block[4224:4226] = list(BFLOAT_OF_HALF)  # row 0
    block[4224 + 2 * 50 : 4224 + 2 * 51] = list(BFLOAT_OF_MINUS_2)  # row 50 = 32 + 16 + 2
    block[4096] = 0x8B  # factors[0][0]: low nibble columns 0 to 31, a factor of 3
    block[4096 + 64 + 50] = 0x38  # factors[1][50]: high nibble columns 96 to 127, a factor of -5
    block[0] = 0x8F  # [0][half 0][lane 0][0]: low nibble row 0, column 0
    block[29 * 128 + 64 + 2 * 4 + 1] = 0x08  # [29][half 1][lane 2][1]: high nibble row 50, column 117
    weights = Tensor((64, 128), FORMATS["INT4_G32"], block).to_float32()
    assert (weights[0, 0], weights[50, 117]) == (0.5 * 3 * 7, -2 * -5 * -8)
    assert np.count_nonzero(weights) == 2


def test_int8_packs_by_hand() -> None:
    values = np.zeros((2, 3), dtype=np.float32)
    values[0] = [127, 0.5, -1.5]  # a scale of one; ties go to even
    values[1] = [128, -64, 1]  # 128 / 127 rounded up to bfloat16 is 1 + 2 / 128
    tensor = Tensor.from_float32(values, FORMATS["INT8_G128"])
    rows = tensor.data[:8192].reshape(32, 64, 4)
    assert rows[0, 0].tolist() == [255, 128, 126, 128]
    assert rows[0, 1].tolist() == [128 + 126, 128 - 63, 129, 128]
    assert (np.delete(rows.reshape(-1), np.r_[0:8]) == 128).all()
    assert tensor.data[8192:].view("<u2").tolist() == [0x3F80, 0x3F82] + [0] * 62
    assert tensor.to_float32().tolist() == [[127, 0, -2], [126 * 1.015625, -63 * 1.015625, 1.015625]]


def test_int4_packs_by_hand() -> None:
    values = np.zeros((17, 34), dtype=np.float32)
    values[0, :2] = [-8, 7]  # a scale of one: -1/8 times -8
    values[0, 32:] = [4, -0.5]  # the largest is positive: its scale is negative, -0.5, or -1/8 times 4
    values[16, :2] = [2, -0.25]  # a scale of -0.25, or 1/32 times -8
    tensor = Tensor.from_float32(values, FORMATS["INT4_G32"])
    nibbles, factors, scales = np.split(tensor.data, [4096, 4224])
    assert (nibbles[:2].tolist(), nibbles[1024:1026].tolist()) == ([0x00, 0x9F], [0x80, 0x89])
    assert (np.delete(nibbles, np.r_[0, 1, 1024, 1025]) == 0x88).all()
    assert (factors[0], factors[16]) == (0xC0, 0x80)
    assert (np.delete(factors, [0, 16]) == 0x88).all()
    assert (scales.view("<u2")[0], scales.view("<u2")[16], np.count_nonzero(scales.view("<u2"))) == (0xBE00, 0x3D00, 2)
    assert np.array_equal(tensor.to_float32(), values)


def test_sizes() -> None:
    assert [FORMATS[name].bits_per_weight for name in STRIPS] == [8.125, 4.25]
    assert [FORMATS[name].block_bytes for name in STRIPS] == [8320, 4352]
    assert FORMATS["INT8_G128"].row_bytes(300) == 3 * 8320
    assert [FORMATS["INT8_G128"].num_bytes((rows, 128)) for rows in (1, 64, 65)] == [8320, 8320, 16640]


@pytest.mark.parametrize("shape", [(1, 1), (64, 128), (65, 129), (130, 300), (3, 40)])
@pytest.mark.parametrize("name", STRIPS)
def test_matrices_of_any_shape_come_back(name: str, shape: tuple[int, int]) -> None:
    codes = np.random.default_rng(1).integers(-8, 8, shape).astype(np.float32)
    codes[:, ::32] = -8  # every group holds the code that shows the scale
    if name == "INT8_G128":
        codes[:, ::128] = 127
    tensor = Tensor.from_float32(codes / 4, FORMATS[name])
    assert tensor.num_bytes == FORMATS[name].num_bytes(shape)
    assert np.array_equal(tensor.to_float32(), codes / 4)


@pytest.mark.parametrize("name", STRIPS)
def test_padding_is_the_code_of_zero_with_a_scale_of_zero(name: str) -> None:
    format = FORMATS[name]
    tensor = Tensor.from_float32(np.ones((70, format.block_weights + 1), dtype=np.float32), format)
    whole = format.unpack(tensor.data.reshape(-1, format.block_bytes)).reshape(2, 2, 64, format.block_weights)
    np.testing.assert_allclose(whole[0, 0], 1, rtol=2**-7)
    np.testing.assert_allclose(whole[1, :, :6, 0], 1, rtol=2**-7)
    assert np.count_nonzero(whole) == 70 * (format.block_weights + 1)
    last = tensor.data.reshape(-1, format.block_bytes)[3]
    assert not last[-128 + 2 * 6 :].any()
    nothing = Tensor.from_float32(np.zeros((64, format.block_weights), dtype=np.float32), format)
    assert (nothing.data[:-128] == (128 if name == "INT8_G128" else 0x88)).all()
    assert not nothing.data[-128:].any()


def random_weights(shape: tuple[int, int], seed: int) -> np.ndarray:
    """Ordinary rows, and rows of zeros, of ties, of one outlier, of extremes and of subnormals."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(0.03)
    values[1::11] = 0
    values[2::11] = -0.0
    values[3::11] = rng.integers(-3, 4, (len(values[3::11]), shape[1]))
    values[4::11, ::37] *= 40
    values[5::11] *= np.float32(1e-42)
    values[6::11] *= np.float32(1e19)
    values[6::11] *= np.float32(1e20)
    values[7::11] = rng.choice([-1.0, 1.0], (len(values[7::11]), shape[1]))
    values[8::11] *= np.float32(1e-36)
    return values


def test_int8_errs_by_half_a_step() -> None:
    values = random_weights((128, 256), 2)
    tensor = Tensor.from_float32(values, FORMATS["INT8_G128"])
    largest = np.repeat(np.abs(values.reshape(128, 2, 128)).max(axis=2), 128, axis=1)
    step = largest / 127 * (1 + 2**-7) + 2**-133  # a bfloat16 rounds up by 2^-7 at most, or by its least value
    assert (np.abs(tensor.to_float32() - values) <= step / 2 * (1 + 1e-6)).all()
    assert tensor.data.reshape(-1, 8320)[:, :8192].min() >= 1


def best_error(group: np.ndarray) -> float:
    """The least squared error that any of the documented scales gives a group of its own, in exact steps."""
    largest = group[np.abs(group).argmax()]
    errors = []
    for scale in [largest * np.float32(-1 / divisor) for divisor in SCALE_DIVISORS]:
        codes = [max(-8, min(7, round(Fraction(float(w)) / Fraction(float(scale))))) for w in group]
        errors.append(sum((float(w) - float(scale) * code) ** 2 for w, code in zip(group, codes, strict=True)))
    return min(errors)


def squared_error(weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    codes = np.clip(np.rint(weights.astype(np.float64) / scales), -8, 7)
    return np.square(weights - codes * scales).sum(axis=-1)


def test_a_group_finds_a_scale_at_least_as_good_as_its_candidates() -> None:
    values = np.random.default_rng(3).standard_normal((40, 32), dtype=np.float32)
    errors, best = squared_error(values, own_scales(values)), np.array([best_error(row) for row in values])
    assert (errors <= best * (1 + 1e-5)).all()
    assert (errors < best * 0.999).any()  # the least-squares fit improves on some


def test_the_common_scale_is_the_nearest_of_its_candidates() -> None:
    own = np.random.default_rng(4).uniform(0.4, 1, (2000, 4)).astype(np.float32)
    own *= np.random.default_rng(5).choice([-1, 1], own.shape).astype(np.float32)
    largest = np.take_along_axis(own, np.abs(own).argmax(axis=1, keepdims=True), axis=1)
    scales = common_scales(own)
    distances = np.square(own - scales * np.clip(np.rint(own / scales), -8, 7), dtype=np.float64).sum(axis=1)
    bits = (largest / -np.array(FACTOR_DIVISORS, dtype=np.float32)).view(np.uint32)
    tried = (bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view(np.float32)
    multiples = np.clip(np.rint(own[:, None] / tried[..., None]), -8, 7) * tried[..., None]
    of_tried = np.square(own[:, None] - multiples, dtype=np.float64).sum(axis=2)
    assert (distances <= of_tried.min(axis=1) * (1 + 1e-5)).all()
    assert len(set(of_tried.argmin(axis=1))) == len(FACTOR_DIVISORS)


def test_factors_cost_little() -> None:
    """Against a scale of its own for every 32 weights, the squared error grows by a few percent."""
    values = np.random.default_rng(6).standard_normal((64, 128), dtype=np.float32)
    errors = np.square(Tensor.from_float32(values, FORMATS["INT4_G32"]).to_float32() - values).sum()
    own = squared_error(values.reshape(-1, 32), own_scales(values.reshape(-1, 32))).sum()
    assert own < errors < 1.08 * own


def test_a_group_beside_a_much_larger_one_keeps_its_bits() -> None:
    """A scale of 1/64 beside one of 1: the nearest factor would be none."""
    values = np.zeros((1, 128), dtype=np.float32)
    values[0, 0] = -8
    values[0, 32:36] = [0.125, -0.125, 0.25, -0.5]
    tensor = Tensor.from_float32(values, FORMATS["INT4_G32"])
    assert tensor.data[4096] == 0x90  # -8 and 1 times a scale of -1/8
    assert np.array_equal(tensor.to_float32(), values)


def test_what_int4_holds_stays() -> None:
    rng = np.random.default_rng(7)
    codes, factors = (
        rng.integers(-8, 8, (640, 4, 32)),
        rng.integers(1, 8, (640, 4, 1)) * rng.choice([-1, 1], (640, 4, 1)),
    )
    codes[..., 9] = -8  # what shows the scale of a group
    factors[::5, 2] = -8
    scales = (np.exp(rng.standard_normal((640, 1, 1))).astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32)
    values = (codes * factors * scales).astype(np.float32).reshape(640, 128)
    assert np.array_equal(Tensor.from_float32(values, FORMATS["INT4_G32"]).to_float32(), values)


def packed_by_core(values: np.ndarray, source: str, target: str, instruction_set: str, threads: int = 2) -> np.ndarray:
    stored = Tensor.from_float32(values, FORMATS[source])
    out = np.full(FORMATS[target].num_bytes(values.shape), 0xAA, dtype=np.uint8)
    bad_row = _core.quantize_into(
        source=source,
        data=stored.data,
        cols=values.shape[1],
        target=target,
        out=out,
        pool=_core.ThreadPool(threads),
        instruction_set=instruction_set,
    )
    assert bad_row is None
    return out


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("target", STRIPS)
def test_core_packs_as_numpy_does(target: str, source: str, instruction_set: str) -> None:
    for seed, shape in enumerate([(64, 128), (193, 300), (1, 1), (7, 33), (70, 640)]):
        values = random_weights(shape, seed)
        if source == "F16":
            values = np.clip(values, -60000, 60000)
        expected = Tensor.from_float32(Tensor.from_float32(values, FORMATS[source]).to_float32(), FORMATS[target])
        assert np.array_equal(packed_by_core(values, source, target, instruction_set), expected.data)


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
def test_core_reads_every_half(instruction_set: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    values = halves[np.isfinite(halves)].astype(np.float32)
    values = np.random.default_rng(4).permutation(values).reshape(64, -1)
    out = packed_by_core(values, "F16", "INT8_G128", instruction_set)
    assert np.array_equal(out, Tensor.from_float32(values, FORMATS["INT8_G128"]).data)


def test_core_reads_unaligned_data() -> None:
    values = random_weights((65, 100), 5)
    stored = Tensor.from_float32(values, FORMATS["BF16"])
    shifted = np.concatenate([np.zeros(1, np.uint8), stored.data])[1:]
    pool, outs = _core.ThreadPool(1), []
    for data in (stored.data, shifted):
        out = np.empty(FORMATS["INT4_G32"].num_bytes(values.shape), dtype=np.uint8)
        _core.quantize_into(source="BF16", data=data, cols=100, target="INT4_G32", out=out, pool=pool)
        outs.append(out)
    assert np.array_equal(*outs)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("target", STRIPS)
def test_what_is_not_finite_is_found(target: str, source: str, bad: float) -> None:
    values = np.ones((200, 130), dtype=np.float32)
    values[150, 129] = values[199, 0] = bad
    stored = Tensor.from_float32(values, FORMATS[source])
    out = np.empty(FORMATS[target].num_bytes(values.shape), dtype=np.uint8)
    for name in _core.instruction_sets():
        found = _core.quantize_into(
            source=source,
            data=stored.data,
            cols=130,
            target=target,
            out=out,
            pool=_core.ThreadPool(2),
            instruction_set=name,
        )
        assert found == 150
    with pytest.raises(WeightsError, match=f"as {target}: one of them is not finite"):
        Tensor.from_float32(values, FORMATS[target])


def test_core_refuses_what_does_not_fit() -> None:
    good = {"source": "F32", "data": np.zeros(512, np.uint8), "cols": 128, "target": "INT8_G128"}
    good |= {"out": np.empty(8320, np.uint8), "pool": _core.ThreadPool(1)}
    assert _core.quantize_into(**good) is None
    with pytest.raises(RequestError, match="out must have 8320 bytes, got 8319"):
        _core.quantize_into(**{**good, "out": np.empty(8319, np.uint8)})
    with pytest.raises(RequestError, match="512 bytes are not rows of 100 weights stored as F32"):
        _core.quantize_into(**{**good, "cols": 100})
    with pytest.raises(Gemma2FastError, match="cannot quantise to Q8_0: expected INT8_G128"):
        _core.quantize_into(**{**good, "target": "Q8_0", "out": np.empty(136, np.uint8)})
    with pytest.raises(Gemma2FastError, match="stored as INT8_G128 cannot be quantised: expected F32"):
        _core.quantize_into(**{**good, "source": "INT8_G128", "data": np.zeros(8320 * 128, np.uint8)})


def test_formats_that_are_only_read_cannot_be_packed() -> None:
    with pytest.raises(WeightsError, match="Q4_K: the format is only read"):
        Tensor.from_float32(np.zeros((1, 256), dtype=np.float32), FORMATS["Q4_K"])
