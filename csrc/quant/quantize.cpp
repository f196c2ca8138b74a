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

// Columns [begin, begin + kGroup) of a row as float32, zeros behind the row's end.
template <int kGroup>
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

template <int kWidth, int kGroup>
GEMMA2_FAST_INLINE Extremes extremes(const float (&group)[kGroup]) {
    Floats<kWidth> low = load<kWidth>(group), high = low;
    Words<kWidth> outside = {};
    for (int k = 0; k < kGroup; k += kWidth) {
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

// What a group becomes: codes 0..15 or 0..255 and a scale that bfloat16 holds.
template <int kGroup>
struct Quantized {
    uint8_t codes[kGroup];
    float scale;
};

template <int kWidth, int kGroup>
GEMMA2_FAST_INLINE void quantize_int8(const float (&group)[kGroup], const Extremes& range, Quantized<kGroup>& out) {
    const float exact = std::fabs(std::max(range.high, -range.low)) / 127.0f;                    // no negative zero
    out.scale = std::bit_cast<float>((std::bit_cast<uint32_t>(exact) + 0xffffu) & 0xffff0000u);  // rounded up
    const float divisor = out.scale > 0 ? out.scale : std::bit_cast<float>(kInfinity);
    for (int k = 0; k < kGroup; k += kWidth)
        put_codes<kWidth>(load<kWidth>(group + k) / divisor + (kRounder + 128.0f), out.codes + k);
}

// The nearest bfloat16, ties to even; zeros lose their sign.
GEMMA2_FAST_INLINE float stored_scale(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = value == value ? bits + 0x7fffu + (bits >> 16 & 1u) : bits;
    return std::bit_cast<float>(rounded & 0xffff0000u) + 0.0f;
}

GEMMA2_FAST_INLINE float inverse(float scale) {
    const float result = 1.0f / scale;
    return (std::bit_cast<uint32_t>(result) & kMagnitude) < kInfinity ? result : 0.0f;
}

// The codes -8..7 as floats.
template <int kWidth>
GEMMA2_FAST_INLINE Floats<kWidth> steps(const Floats<kWidth>& weights, float inverse_scale) {
    Floats<kWidth> ratios = weights * inverse_scale;
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

template <int kWidth, int kGroup>
GEMMA2_FAST_INLINE float squared_error(const float (&group)[kGroup], float scale, float inverse_scale) {
    Floats<kWidth> sums[kLanes / kWidth] = {};
    for (int k = 0; k < kGroup; k += kLanes) {
        for (int i = 0; i < kLanes / kWidth; ++i) {
            const auto weights = load<kWidth>(group + k + i * kWidth);
            const auto differences = weights - scale * steps<kWidth>(weights, inverse_scale);
            sums[i] += differences * differences;
        }
    }
    return folded<kWidth>(sums);
}

// The scale that fits the weights to the codes they get at another.
template <int kWidth, int kGroup>
GEMMA2_FAST_INLINE float fitted_scale(const float (&group)[kGroup], float inverse_scale) {
    Floats<kWidth> products[kLanes / kWidth] = {}, squares[kLanes / kWidth] = {};
    for (int k = 0; k < kGroup; k += kLanes) {
        for (int i = 0; i < kLanes / kWidth; ++i) {
            const auto weights = load<kWidth>(group + k + i * kWidth), codes = steps<kWidth>(weights, inverse_scale);
            products[i] += weights * codes;
            squares[i] += codes * codes;
        }
    }
    return stored_scale(folded<kWidth>(products) / folded<kWidth>(squares));
}

constexpr int kCandidates = 3;
constexpr double kScaleDivisors[kCandidates] = {8.0, 7.0, 7.5};

template <int kWidth, int kGroup>
GEMMA2_FAST_INLINE void quantize_int4(const float (&group)[kGroup], const Extremes& range, Quantized<kGroup>& out) {
    const float largest = range.high >= -range.low ? range.high : range.low;
    float scales[kCandidates], inverses[kCandidates], errors[kCandidates];
    for (int i = 0; i < kCandidates; ++i) {
        scales[i] = stored_scale(largest * static_cast<float>(-1 / kScaleDivisors[i]));
        inverses[i] = inverse(scales[i]);
    }
    for (int i = 0; i < kCandidates; ++i) errors[i] = squared_error<kWidth>(group, scales[i], inverses[i]);
    int best = 0;
    for (int i = 1; i < kCandidates; ++i) best = errors[i] < errors[best] ? i : best;

    const float fitted = fitted_scale<kWidth>(group, inverses[best]), fitted_inverse = inverse(fitted);
    const bool refit = squared_error<kWidth>(group, fitted, fitted_inverse) < errors[best];
    out.scale = refit ? fitted : scales[best];
    const float inverse_scale = refit ? fitted_inverse : inverses[best];
    for (int k = 0; k < kGroup; k += kWidth)
        put_codes<kWidth>(steps<kWidth>(load<kWidth>(group + k), inverse_scale) + (kRounder + 8.0f), out.codes + k);
}

GEMMA2_FAST_INLINE void put(Int8G128Block& block, int64_t row, const Quantized<128>& quantized) {
    for (int k = 0; k < 128; k += 4) std::memcpy(block.codes[k / 4][row], quantized.codes + k, 4);
    block.scales[row] = upper_half(quantized.scale);
}

// The block's nibbles must be zeros before its first row.
template <int kGroup>
GEMMA2_FAST_INLINE void put(Int4Block<kGroup>& block, int64_t row, const Quantized<kGroup>& quantized) {
    const int64_t half = row / 32, lane = row % 16;
    const int shift = row % 32 < 16 ? 0 : 4;
    for (int k = 0; k < kGroup; k += 4) {
        uint32_t four, present;
        std::memcpy(&four, quantized.codes + k, 4);
        std::memcpy(&present, block.nibbles[k / 4][half][lane], 4);
        present |= four << shift;  // codes have four bits: none reaches the next byte
        std::memcpy(block.nibbles[k / 4][half][lane], &present, 4);
    }
    block.scales[row] = upper_half(quantized.scale);
}

template <int kWidth, int kGroup>
GEMMA2_FAST_INLINE void quantize_for(const Int4Block<kGroup>&, const float (&group)[kGroup], const Extremes& range,
                                     Quantized<kGroup>& out) {
    quantize_int4<kWidth>(group, range, out);
}
template <int kWidth>
GEMMA2_FAST_INLINE void quantize_for(const Int8G128Block&, const float (&group)[128], const Extremes& range,
                                     Quantized<128>& out) {
    quantize_int8<kWidth>(group, range, out);
}

// One strip; the first of its rows that is not finite, or -1.
template <int kWidth, typename Block, int kGroup>
GEMMA2_FAST_INLINE int64_t quantize_strip(const UnquantizedRows& source, int64_t strip, std::byte* out) {
    const int64_t first_row = strip * kStripRows, rows = std::min(kStripRows, source.rows - first_row);
    int64_t bad_row = -1;
    for (int64_t begin = 0; begin < source.cols; begin += kGroup, out += sizeof(Block)) {
        Block block = {};
        float group[kGroup] = {};
        Quantized<kGroup> quantized;
        for (int64_t row = 0; row < kStripRows; ++row) {
            if (row < rows) read_group(source, first_row + row, begin, group);
            if (row == rows) std::fill(group, group + kGroup, 0.0f);
            const Extremes range = extremes<kWidth>(group);
            if (!range.finite && (bad_row < 0 || first_row + row < bad_row)) bad_row = first_row + row;
            quantize_for<kWidth>(block, group, range, quantized);
            put(block, row, quantized);
        }
        std::memcpy(out, &block, sizeof block);
    }
    return bad_row;
}

using QuantizeStrip = int64_t (*)(const UnquantizedRows&, int64_t, std::byte*);

template <typename Block, int kGroup>
int64_t strip_of_any(const UnquantizedRows& source, int64_t strip, std::byte* out) {
    return quantize_strip<4, Block, kGroup>(source, strip, out);
}
#if defined(__x86_64__)
template <typename Block, int kGroup>
[[gnu::target("avx512f,avx512bw,avx512dq,avx512vl")]]
int64_t strip_of_avx512(const UnquantizedRows& source, int64_t strip, std::byte* out) {
    return quantize_strip<16, Block, kGroup>(source, strip, out);
}
#endif

template <typename Block, int kGroup>
QuantizeStrip for_set([[maybe_unused]] InstructionSet set) {
#if defined(__x86_64__)
    if (set >= InstructionSet::kAvx512Vnni) return strip_of_avx512<Block, kGroup>;
#endif
    return strip_of_any<Block, kGroup>;
}

QuantizeStrip quantizer(WeightType target, InstructionSet set) {
    switch (target) {
        case WeightType::kInt8G128:
            return for_set<Int8G128Block, 128>(set);
        case WeightType::kInt4G128:
            return for_set<Int4Block<128>, 128>(set);
        case WeightType::kInt4G32:
            return for_set<Int4Block<32>, 32>(set);
        default:
            throw Error("cannot quantise to " + std::string(weight_format(target).name) +
                        ": expected INT8_G128, INT4_G128 or INT4_G32");
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
