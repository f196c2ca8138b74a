#include "cpu/kernels/declarations.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kPartCols = 16;  // columns of a part sum
constexpr int64_t kParts = kQuantizedCols / kPartCols;
constexpr int32_t kLargestCode = 127, kUpperUnit = 128;
constexpr float kLargestOutlier = kLargestCode * kUpperUnit;
// The largest magnitude of a group over its third largest, above which two outliers keep more bits: that costs time.
constexpr float kOutlierRatio = 2.0f;

#if defined(__AVX512F__)
inline void store_rounded(int8_t* p, F32 a) {  // saturates
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline F32 exchange_halves(F32 a, int64_t lanes) {  // lane i gets lane i + lanes, and the other way round
    if (lanes == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
    if (lanes == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
    if (lanes == 2) return {_mm512_permute_ps(a.v, 0x4e)};
    return {_mm512_permute_ps(a.v, 0xb1)};
}
#elif defined(__AVX2__)
inline void store_rounded(int8_t* p, F32 a) {  // saturates
    const __m256i wide = _mm256_cvtps_epi32(a.v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline F32 exchange_halves(F32 a, int64_t lanes) {
    if (lanes == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
    if (lanes == 2) return {_mm256_permute_ps(a.v, 0x4e)};
    return {_mm256_permute_ps(a.v, 0xb1)};
}
#else
inline void store_rounded(int8_t* p, F32 a) {  // saturates
    *p = static_cast<int8_t>(max(min(round_to_nearest(a), broadcast(127)), broadcast(-128)).v);
}
inline F32 exchange_halves(F32 a, int64_t) { return a; }
#endif

// The three largest magnitudes of a group.
struct Magnitudes {
    float first, third;
    bool finite;
};

Magnitudes magnitudes(const float* x) {
    F32 first = broadcast(0), second = first, third = first, not_finite = first;
    for (int64_t i = 0; i < kQuantizedCols; i += kLanes) {
        const F32 element = abs(load(x + i));
        not_finite = fma(element, broadcast(0), not_finite);  // NaN from a NaN or an infinity, else 0
        const F32 below_first = min(first, element), below_second = min(second, below_first);
        first = max(first, element);
        second = max(second, below_first);
        third = max(third, below_second);
    }
    for (int64_t lanes = kLanes / 2; lanes > 0; lanes /= 2) {
        const F32 a = exchange_halves(first, lanes), b = exchange_halves(second, lanes),
                  c = exchange_halves(third, lanes);
        const F32 below_first = min(first, a), seconds = max(second, b);
        first = max(first, a);
        second = max(below_first, seconds);
        third = max(min(below_first, seconds), max(third, c));
    }
    float lanes[2][kLanes];
    store(lanes[0], first);
    store(lanes[1], third);
    return {lanes[0][0], lanes[1][0], reduce_add(not_finite) == 0};
}

// Where the results of one group go.
struct Group {
    int8_t* codes;
    Outliers& outliers;
    int32_t* part_sums;
};

// The values of a group that need more than eight bits, of which there are two at most. Returns the sum of what their
// codes leave over.
int32_t split_outliers(const float* x, float factor, const Group& out) {
    out.outliers = {};
    int32_t sum = 0, count = 0;
    for (int32_t col = 0; col < kQuantizedCols && count < 2; ++col) {
        const auto code = static_cast<int32_t>(__builtin_rintf(x[col] * factor));
        if (code <= kLargestCode && code >= -kLargestCode) continue;
        const int32_t lower = ((code + kUpperUnit / 2) & (kUpperUnit - 1)) - kUpperUnit / 2;
        const int32_t digit = (code - lower) / kUpperUnit;
        out.codes[col] = static_cast<int8_t>(lower);
        out.outliers.upper[count][col % 4] = static_cast<int8_t>(digit);
        out.outliers.step[count] = static_cast<int16_t>(col / 4);
        out.outliers.digit[count++] = static_cast<int16_t>(digit);
        sum += digit * kUpperUnit;
    }
    return sum;
}

// Codes of x * factor. Returns the sum of all.
int32_t round_group(const float* x, float factor, bool has_outliers, const Group& out) {
    for (int64_t i = 0; i < kQuantizedCols; i += kLanes)
        store_rounded(out.codes + i, mul(load(x + i), broadcast(factor)));
    int32_t sum = has_outliers ? split_outliers(x, factor, out) : 0;
    for (int64_t part = 0; part < kParts; ++part) {
        int32_t part_sum = 0;
        for (int64_t i = 0; i < kPartCols; ++i) part_sum += out.codes[part * kPartCols + i];
        out.part_sums[part] = part_sum;
        sum += part_sum;
    }
    return sum;
}

}  // namespace

void quantize_rows(const float* x, int64_t x_stride, int64_t num_tokens, int64_t cols, int64_t first_token,
                   int64_t first_group, const QuantizedRows& out) {
    constexpr float kSmallest = 1e-30f;  // below it the factor could overflow
    for (int64_t t = 0; t < num_tokens; ++t, x += x_stride)
        for (int64_t col = 0; col < cols; col += kQuantizedCols) {
            const int64_t place = (first_group + col / kQuantizedCols) * out.token_stride + first_token + t;
            const Group group{out.codes + place * kQuantizedCols, out.outliers[place], out.part_sums + place * kParts};
            const float* values = x + col;
            float whole[kQuantizedCols];
            if (cols - col < kQuantizedCols) {
                std::memset(whole, 0, sizeof whole);
                std::memcpy(whole, values, static_cast<std::size_t>(cols - col) * sizeof(float));
                values = whole;
            }
            const Magnitudes largest = magnitudes(values);
            const bool visible = largest.finite && largest.first > kSmallest;
            const bool has_outliers = visible && largest.first > kOutlierRatio * largest.third;
            const bool by_third = has_outliers && largest.third * kUpperUnit >= largest.first;
            const float unit = by_third ? largest.third : largest.first;
            const float most = has_outliers && !by_third ? kLargestOutlier : static_cast<float>(kLargestCode);
            out.scales[place] = !largest.finite ? __builtin_nanf("") : visible ? unit / most : 0;
            out.has_outliers[place] = has_outliers;
            if (visible) {
                out.sums[place] = round_group(values, most / unit, has_outliers, group);
            } else {
                out.sums[place] = 0;
                std::memset(group.codes, 0, kQuantizedCols);
                std::memset(group.part_sums, 0, kParts * sizeof(int32_t));
            }
        }
}

GEMMA2_FAST_END_ISA
