#include "cpu/kernels/declarations.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kPartCols = 16;  // columns of a part sum
constexpr int64_t kParts = kQuantizedCols / kPartCols;
constexpr int32_t kLargestCode = 127, kUpperUnit = 128;
constexpr float kLargestOutlier = kLargestCode * kUpperUnit;

#if defined(__AVX512F__)
inline void store_rounded(int32_t* p, F32 a) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(a.v)); }
inline F32 exchange_halves(F32 a, int64_t lanes) {  // lane i gets lane i + lanes, and the other way round
    if (lanes == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
    if (lanes == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
    if (lanes == 2) return {_mm512_permute_ps(a.v, 0x4e)};
    return {_mm512_permute_ps(a.v, 0xb1)};
}
#elif defined(__AVX2__)
inline void store_rounded(int32_t* p, F32 a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_cvtps_epi32(a.v));
}
inline F32 exchange_halves(F32 a, int64_t lanes) {
    if (lanes == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
    if (lanes == 2) return {_mm256_permute_ps(a.v, 0x4e)};
    return {_mm256_permute_ps(a.v, 0xb1)};
}
#else
inline void store_rounded(int32_t* p, F32 a) { *p = static_cast<int32_t>(round_to_nearest(a).v); }
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

struct Group {
    int8_t* codes;
    Outliers& outliers;
    int32_t* part_sums;
};

// Codes of x * factor, of which two at most need more than eight bits. Returns the sum of all.
int32_t round_group(const float* x, float factor, const Group& out) {
    alignas(64) int32_t rounded[kQuantizedCols];
    for (int64_t i = 0; i < kQuantizedCols; i += kLanes)
        store_rounded(rounded + i, mul(load(x + i), broadcast(factor)));
    out.outliers = {};
    int32_t sum = 0, num_outliers = 0;
    for (int64_t part = 0; part < kParts; ++part) {
        int32_t* codes = rounded + part * kPartCols;
        int32_t part_sum = 0, any = 0;
        for (int64_t i = 0; i < kPartCols; ++i) {
            part_sum += codes[i];
            any |= codes[i] > kLargestCode || codes[i] < -kLargestCode;
        }
        sum += part_sum;
        for (int64_t i = 0; any && i < kPartCols; ++i) {
            if ((codes[i] <= kLargestCode && codes[i] >= -kLargestCode) || num_outliers == 2) continue;
            const int32_t lower = ((codes[i] + kUpperUnit / 2) & (kUpperUnit - 1)) - kUpperUnit / 2;
            const int32_t digit = (codes[i] - lower) / kUpperUnit;
            out.outliers.upper[num_outliers][i % 4] = static_cast<int8_t>(digit);
            out.outliers.step[num_outliers] = static_cast<int16_t>((part * kPartCols + i) / 4);
            out.outliers.digit[num_outliers++] = static_cast<int16_t>(digit);
            part_sum -= codes[i] - lower;
            codes[i] = lower;
        }
        out.part_sums[part] = part_sum;
    }
    for (int64_t i = 0; i < kQuantizedCols; ++i) out.codes[i] = static_cast<int8_t>(rounded[i]);
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
            const bool by_third = largest.third * kUpperUnit >= largest.first;
            const float unit = by_third ? largest.third : largest.first;
            const float most = by_third ? static_cast<float>(kLargestCode) : kLargestOutlier;
            out.scales[place] = !largest.finite ? __builtin_nanf("") : visible ? unit / most : 0;
            if (visible) {
                out.sums[place] = round_group(values, most / unit, group);
            } else {
                out.sums[place] = 0;
                std::memset(group.codes, 0, kQuantizedCols);
                std::memset(group.part_sums, 0, kParts * sizeof(int32_t));
                group.outliers = {};
            }
        }
}

GEMMA2_FAST_END_ISA
