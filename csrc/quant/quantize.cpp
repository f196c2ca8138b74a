#include "quant/quantize.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <string>

#include "base/errors.h"

// Vectors wider than the compiler's target may use pass between functions here, but all of those are inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace gemma2_fast {
namespace {

// Everything below is inlined into one function per instruction set, and compiled for that.
#define GEMMA2_FAST_INLINE [[gnu::always_inline]] inline

constexpr uint32_t kMagnitude = 0x7fffffff;
constexpr uint32_t kInfinity = 0x7f800000;
// 1.5 * 2^23: adding it leaves no fraction, ties going to even, and the integer stands in the sum's lowest bits.
constexpr float kRounder = 12582912.0f;

// Sums run over 16 lanes, in as many vectors as the instruction set needs: their order is part of what the formats
// mean.
constexpr int kLanes = 16;
template <int kWidth>
struct Vector {
    using Floats [[gnu::vector_size(sizeof(float) * kWidth)]] = float;
    using Words [[gnu::vector_size(sizeof(uint32_t) * kWidth)]] = uint32_t;
};
template <int kWidth>
using Floats = typename Vector<kWidth>::Floats;
template <int kWidth>
using Words = typename Vector<kWidth>::Words;

template <int kWidth>
GEMMA2_FAST_INLINE Floats<kWidth> load(const float* values) {
    Floats<kWidth> lanes;
    std::memcpy(&lanes, values, sizeof lanes);
    return lanes;
}

// The lowest bytes of sums with kRounder.
template <int kWidth>
GEMMA2_FAST_INLINE void put_codes(const Floats<kWidth>& sums, uint8_t* out) {
    const auto bits = std::bit_cast<Words<kWidth>>(sums);
    for (int lane = 0; lane < kWidth; ++lane) out[lane] = static_cast<uint8_t>(bits[lane]);
}

GEMMA2_FAST_INLINE uint16_t upper_half(float value) {
    return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}

GEMMA2_FAST_INLINE float float_of_half(uint16_t half) {
    const uint32_t magnitude = half & 0x7fffu, sign = (half & 0x8000u) << 16;
    const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;  // exact for subnormals too
    const uint32_t special = magnitude >= 0x7c00u ? kInfinity : 0u;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

constexpr int kGroup = 128;  // weights of a row in a block

// Columns [begin, begin + kGroup) of a row as float32, zeros behind the row's end.
GEMMA2_FAST_INLINE void read_group(const UnquantizedRows& source, int64_t row, int64_t begin, float (&group)[kGroup]) {
    const int64_t count = std::min<int64_t>(kGroup, source.cols - begin);
    const std::byte* data = source.data + (row * source.cols + begin) * (source.type == WeightType::kF32 ? 4 : 2);
    if (count < kGroup) std::fill(group, group + kGroup, 0.0f);
    if (source.type == WeightType::kF32) {
        std::memcpy(group, data, count * sizeof(float));
        return;
    }
    uint16_t stored[kGroup] = {};
    std::memcpy(stored, data, count * sizeof(uint16_t));
    if (source.type == WeightType::kBF16) {
        for (int k = 0; k < kGroup; ++k) group[k] = std::bit_cast<float>(static_cast<uint32_t>(stored[k]) << 16);
    } else {
        for (int k = 0; k < kGroup; ++k) group[k] = float_of_half(stored[k]);
    }
}

struct Extremes {
    float low, high;
    bool finite;
};

template <int kWidth, int kCount>
GEMMA2_FAST_INLINE Extremes extremes(const float* group) {
    Floats<kWidth> low = load<kWidth>(group), high = low;
    Words<kWidth> outside = {};
    for (int k = 0; k < kCount; k += kWidth) {
        const auto values = load<kWidth>(group + k);
        low = values < low ? values : low;
        high = values > high ? values : high;
        // An exponent of all ones carries into the sign bit.
        outside |= (std::bit_cast<Words<kWidth>>(values) & kMagnitude) + 0x00800000u;
    }
    Extremes result{low[0], high[0], true};
    for (int lane = 0; lane < kWidth; ++lane) {
        result.low = std::min(result.low, low[lane]);
        result.high = std::max(result.high, high[lane]);
        result.finite &= outside[lane] >> 31 == 0;
    }
    return result;
}

// What a group becomes: codes 1..255, or codes and factors 0..15, and a scale that bfloat16 holds.
struct Quantized {
    uint8_t codes[kGroup];
    uint8_t factors[4];
    float scale;
    bool finite;  // else the rest is worthless
};

template <int kWidth>
GEMMA2_FAST_INLINE void quantize_group(const Int8G128Block&, const float (&group)[kGroup], Quantized& out) {
    const Extremes range = extremes<kWidth, kGroup>(group);
    const float exact = std::fabs(std::max(range.high, -range.low)) / 127.0f;                    // no negative zero
    out.scale = std::bit_cast<float>((std::bit_cast<uint32_t>(exact) + 0xffffu) & 0xffff0000u);  // rounded up
    out.finite = range.finite;
    const float divisor = out.scale > 0 ? out.scale : std::bit_cast<float>(kInfinity);
    for (int k = 0; k < kGroup; k += kWidth)
        put_codes<kWidth>(load<kWidth>(group + k) / divisor + (kRounder + 128.0f), out.codes + k);
}

// The nearest bfloat16, ties to even; zeros lose their sign.
GEMMA2_FAST_INLINE float stored_scale(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    return std::bit_cast<float>((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u) + 0.0f;
}

GEMMA2_FAST_INLINE float inverse(float scale) {
    const float result = 1.0f / scale;
    return (std::bit_cast<uint32_t>(result) & kMagnitude) < kInfinity ? result : 0.0f;
}

// The nearest integers -8..7, as floats.
template <int kWidth>
GEMMA2_FAST_INLINE Floats<kWidth> steps(Floats<kWidth> ratios) {
    ratios = ratios < -8.0f ? Floats<kWidth>{} - 8.0f : ratios;
    ratios = ratios > 7.0f ? Floats<kWidth>{} + 7.0f : ratios;
    return (ratios + kRounder) - kRounder;
}

// Each half of the lanes onto the other, down to one.
template <int kWidth>
GEMMA2_FAST_INLINE float folded(const Floats<kWidth> (&sums)[kLanes / kWidth]) {
    float lanes[kLanes];
    std::memcpy(lanes, sums, sizeof lanes);
    const auto eight = load<8>(lanes) + load<8>(lanes + 8);
    std::memcpy(lanes, &eight, sizeof eight);
    const auto four = load<4>(lanes) + load<4>(lanes + 4);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

constexpr int kPart = 32;  // weights that share a factor
constexpr int kParts = kGroup / kPart;

template <int kWidth>
GEMMA2_FAST_INLINE float squared_error(const float* part, float scale, float inverse_scale) {
    Floats<kWidth> sums[kLanes / kWidth] = {};
    for (int k = 0; k < kPart; k += kLanes) {
        for (int i = 0; i < kLanes / kWidth; ++i) {
            const auto weights = load<kWidth>(part + k + i * kWidth);
            const auto differences = weights - scale * steps<kWidth>(weights * inverse_scale);
            sums[i] += differences * differences;
        }
    }
    return folded<kWidth>(sums);
}

// The scale that fits the weights to the codes they get at another.
template <int kWidth>
GEMMA2_FAST_INLINE float fitted_scale(const float* part, float inverse_scale) {
    Floats<kWidth> products[kLanes / kWidth] = {}, squares[kLanes / kWidth] = {};
    for (int k = 0; k < kPart; k += kLanes) {
        for (int i = 0; i < kLanes / kWidth; ++i) {
            const auto weights = load<kWidth>(part + k + i * kWidth), codes = steps<kWidth>(weights * inverse_scale);
            products[i] += weights * codes;
            squares[i] += codes * codes;
        }
    }
    return folded<kWidth>(products) / folded<kWidth>(squares);
}

constexpr int kCandidates = 3;
constexpr double kScaleDivisors[kCandidates] = {8.0, 7.0, 7.5};

// The scale that a part would have alone, not yet rounded.
template <int kWidth>
GEMMA2_FAST_INLINE float own_scale(const float* part, const Extremes& range) {
    const float largest = range.high >= -range.low ? range.high : range.low;
    float scales[kCandidates], inverses[kCandidates], errors[kCandidates];
    for (int i = 0; i < kCandidates; ++i) {
        scales[i] = largest * static_cast<float>(-1 / kScaleDivisors[i]);
        inverses[i] = inverse(scales[i]);
    }
    for (int i = 0; i < kCandidates; ++i) errors[i] = squared_error<kWidth>(part, scales[i], inverses[i]);
    int best = 0;
    for (int i = 1; i < kCandidates; ++i) best = errors[i] < errors[best] ? i : best;
    const float fitted = fitted_scale<kWidth>(part, inverses[best]);
    return squared_error<kWidth>(part, fitted, inverse(fitted)) < errors[best] ? fitted : scales[best];
}

constexpr double kFactorDivisors[] = {8.0, 7.0, 6.0, 5.0, 4.0};

using Parts = Floats<kParts>;  // a lane for each part of a group

struct CommonScale {
    float scale = 0;
    Parts factors = {};
};

// The scale whose multiples come nearest to those that the parts would have alone.
GEMMA2_FAST_INLINE CommonScale common_scale(const Parts& own) {
    float largest = own[0];
    for (int part = 1; part < kParts; ++part) largest = std::fabs(own[part]) > std::fabs(largest) ? own[part] : largest;
    CommonScale best;
    float least = 0;
    for (const double divisor : kFactorDivisors) {
        const float scale = stored_scale(largest * static_cast<float>(-1 / divisor));
        Parts factors = steps<kParts>(own * inverse(scale));
        factors = factors == 0.0f ? (own != 0.0f ? Parts{} + 1.0f : factors) : factors;
        const Parts difference = own - scale * factors, squares = difference * difference;
        const float error = (squares[0] + squares[2]) + (squares[1] + squares[3]);
        if (divisor == kFactorDivisors[0] || error < least) {
            best = {scale, factors};
            least = error;
        }
    }
    return best;
}

template <int kWidth>
GEMMA2_FAST_INLINE void quantize_group(const Int4G32Block&, const float (&group)[kGroup], Quantized& out) {
    Parts own;
    out.finite = true;
    for (int part = 0; part < kParts; ++part) {
        const Extremes range = extremes<kWidth, kPart>(group + part * kPart);
        out.finite &= range.finite;
        own[part] = own_scale<kWidth>(group + part * kPart, range);
    }
    const CommonScale common = common_scale(own);
    out.scale = common.scale;
    for (int part = 0; part < kParts; ++part) {
        const float inverse_scale = inverse(common.scale * common.factors[part]);
        for (int k = part * kPart; k < (part + 1) * kPart; k += kWidth)
            put_codes<kWidth>(steps<kWidth>(load<kWidth>(group + k) * inverse_scale) + (kRounder + 8.0f),
                              out.codes + k);
        out.factors[part] = static_cast<uint8_t>(std::bit_cast<uint32_t>(common.factors[part] + (kRounder + 8.0f)));
    }
}

GEMMA2_FAST_INLINE void put(Int8G128Block& block, int64_t row, const Quantized& quantized) {
    for (int k = 0; k < kGroup; k += 4) std::memcpy(block.codes[k / 4][row], quantized.codes + k, 4);
    block.scales[row] = upper_half(quantized.scale);
}

// The block's nibbles must be zeros before its first row.
GEMMA2_FAST_INLINE void put(Int4G32Block& block, int64_t row, const Quantized& quantized) {
    const int64_t half = row / 32, lane = row % 16;
    const int shift = row % 32 < 16 ? 0 : 4;
    for (int k = 0; k < kGroup; k += 4) {
        uint32_t four, present;
        std::memcpy(&four, quantized.codes + k, 4);
        std::memcpy(&present, block.nibbles[k / 4][half][lane], 4);
        present |= four << shift;  // codes have four bits: none reaches the next byte
        std::memcpy(block.nibbles[k / 4][half][lane], &present, 4);
    }
    for (int i = 0; i < 2; ++i)
        block.factors[i][row] = static_cast<uint8_t>(quantized.factors[2 * i] | quantized.factors[2 * i + 1] << 4);
    block.scales[row] = upper_half(quantized.scale);
}

// One strip; the first of its rows that is not finite, or -1.
template <int kWidth, typename Block>
GEMMA2_FAST_INLINE int64_t quantize_strip(const UnquantizedRows& source, int64_t strip, std::byte* out) {
    const int64_t first_row = strip * kStripRows, rows = std::min(kStripRows, source.rows - first_row);
    int64_t bad_row = -1;
    for (int64_t begin = 0; begin < source.cols; begin += kGroup, out += sizeof(Block)) {
        Block block = {};
        float group[kGroup] = {};
        Quantized quantized;
        for (int64_t row = 0; row < kStripRows; ++row) {
            if (row < rows) read_group(source, first_row + row, begin, group);
            if (row == rows) std::fill(group, group + kGroup, 0.0f);
            quantize_group<kWidth>(block, group, quantized);
            if (!quantized.finite && (bad_row < 0 || first_row + row < bad_row)) bad_row = first_row + row;
            put(block, row, quantized);
        }
        std::memcpy(out, &block, sizeof block);
    }
    return bad_row;
}

using QuantizeStrip = int64_t (*)(const UnquantizedRows&, int64_t, std::byte*);

template <typename Block>
int64_t strip_of_any(const UnquantizedRows& source, int64_t strip, std::byte* out) {
    return quantize_strip<4, Block>(source, strip, out);
}
#if defined(__x86_64__)
template <typename Block>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]]
int64_t strip_of_avx512(const UnquantizedRows& source, int64_t strip, std::byte* out) {
    return quantize_strip<16, Block>(source, strip, out);
}
#endif

template <typename Block>
QuantizeStrip for_set([[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
    if (set >= InstructionSet::kAvx512Vnni) return strip_of_avx512<Block>;
#endif
    return strip_of_any<Block>;
}

QuantizeStrip quantizer(WeightType target, InstructionSet set) {
    switch (target) {
        case WeightType::kInt8G128:
            return for_set<Int8G128Block>(set);
        case WeightType::kInt4G32:
            return for_set<Int4G32Block>(set);
        default:
            throw Error("cannot quantise to " + std::string(weight_format(target).name) +
                        ": expected INT8_G128 or INT4_G32");
    }
}

}  // namespace

std::optional<int64_t> quantize_strips(const UnquantizedRows& source, WeightType target, std::byte* out,
                                       InstructionSet set, ThreadPool& pool) {
    if (source.type != WeightType::kF32 && source.type != WeightType::kF16 && source.type != WeightType::kBF16)
        throw Error("weights stored as " + std::string(weight_format(source.type).name) +
                    " cannot be quantised: expected F32, F16 or BF16");
    const QuantizeStrip quantize = quantizer(target, set);
    const WeightFormat& format = weight_format(target);
    const int64_t strip_bytes = (source.cols + format.block_weights - 1) / format.block_weights * format.block_bytes;
    std::atomic<int64_t> first_bad{source.rows};
    pool.parallel_for((source.rows + kStripRows - 1) / kStripRows, [&](int64_t strip, int /*thread*/) {
        const int64_t bad_row = quantize(source, strip, out + strip * strip_bytes);
        int64_t known = first_bad.load();
        while (bad_row >= 0 && bad_row < known && !first_bad.compare_exchange_weak(known, bad_row)) {
        }
    });
    return first_bad < source.rows ? std::optional<int64_t>(first_bad) : std::nullopt;
}

}  // namespace gemma2_fast
