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

// Per set: round_codes rounds 128 values and saturates; sum_codes adds up sixteen codes each; exchange_halves gives
// lane i what lane i + lanes has, and the other way round.
#if defined(__AVX512VNNI__)
inline void round_codes(const float* x, float factor, int8_t* codes) {
    // Packing works on quarters of registers: what comes out is in the order of quarters.
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int64_t i = 0; i < kQuantizedCols; i += 64) {
        __m512i rounded[4];
        GEMMA2_FAST_UNROLL
        for (int v = 0; v < 4; ++v) rounded[v] = _mm512_cvtps_epi32(mul(load(x + i + v * 16), broadcast(factor)).v);
        const __m512i packed =
            _mm512_packs_epi16(_mm512_packs_epi32(rounded[0], rounded[1]), _mm512_packs_epi32(rounded[2], rounded[3]));
        _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(in_order, packed));
    }
}
inline void sum_codes(const int8_t* codes, int32_t* part_sums) {
    __m512i sums[2];
    for (int i = 0; i < 2; ++i) {
        const __m512i fours =
            _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(codes + i * 64));
        const __m512i eights = _mm512_add_epi32(fours, _mm512_shuffle_epi32(fours, _MM_PERM_CDAB));
        sums[i] = _mm512_add_epi32(eights, _mm512_shuffle_epi32(eights, _MM_PERM_BADC));
    }
    const __m512i one_each = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i parts = _mm512_permutex2var_epi32(sums[0], one_each, sums[1]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(part_sums), _mm512_castsi512_si256(parts));
}
inline F32 exchange_halves(F32 a, int64_t lanes) {
    if (lanes == 8) return {_mm512_shuffle_f32x4(a.v, a.v, 0x4e)};
    if (lanes == 4) return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)};
    if (lanes == 2) return {_mm512_permute_ps(a.v, 0x4e)};
    return {_mm512_permute_ps(a.v, 0xb1)};
}
#elif defined(__AVX2__)
inline void round_codes(const float* x, float factor, int8_t* codes) {
    for (int64_t i = 0; i < kQuantizedCols; i += kLanes) {
        const __m256i wide = _mm256_cvtps_epi32(mul(load(x + i), broadcast(factor)).v);
        const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), _mm_packs_epi16(words, words));
    }
}
inline void sum_codes(const int8_t* codes, int32_t* part_sums) {
    for (int64_t part = 0; part < kParts; part += 2) {
        const __m256i of_parts = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + part * kPartCols));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), of_parts);
        const __m256i fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
        const __m256i eights = _mm256_add_epi32(fours, _mm256_shuffle_epi32(fours, 0xb1));
        const __m256i sums = _mm256_add_epi32(eights, _mm256_shuffle_epi32(eights, 0x4e));
        part_sums[part] = _mm256_cvtsi256_si32(sums);
        part_sums[part + 1] = _mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1));
    }
}
inline F32 exchange_halves(F32 a, int64_t lanes) {
    if (lanes == 4) return {_mm256_permute2f128_ps(a.v, a.v, 1)};
    if (lanes == 2) return {_mm256_permute_ps(a.v, 0x4e)};
    return {_mm256_permute_ps(a.v, 0xb1)};
}
#else
inline void round_codes(const float* x, float factor, int8_t* codes) {
    for (int64_t i = 0; i < kQuantizedCols; ++i)
        codes[i] = static_cast<int8_t>(
            max(min(round_to_nearest(mul(load(x + i), broadcast(factor))), broadcast(127)), broadcast(-128)).v);
}
inline void sum_codes(const int8_t* codes, int32_t* part_sums) {
    for (int64_t part = 0; part < kParts; ++part, codes += kPartCols) {
        part_sums[part] = 0;
        for (int64_t i = 0; i < kPartCols; ++i) part_sums[part] += codes[i];
    }
}
inline F32 exchange_halves(F32 a, int64_t) { return a; }
#endif

// The three largest magnitudes of a group.
struct Magnitudes {
    float first, third;
    bool finite;
};

Magnitudes magnitudes(const float* x) {
    F32 first = broadcast(0), second = first, third = first;
    F32 not_finite = first;  // NaN where there was a NaN or an infinity, else 0
    for (int64_t i = 0; i < kQuantizedCols; i += kLanes) {
        const F32 element = abs(load(x + i));
        not_finite = fma(element, broadcast(0), not_finite);
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
        not_finite = add(not_finite, exchange_halves(not_finite, lanes));
    }
    float lanes[3][kLanes];
    store(lanes[0], first);
    store(lanes[1], third);
    store(lanes[2], not_finite);
    return {lanes[0][0], lanes[1][0], lanes[2][0] == 0};
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
    round_codes(x, factor, out.codes);
    int32_t sum = has_outliers ? split_outliers(x, factor, out) : 0;
    sum_codes(out.codes, out.part_sums);
    for (int64_t part = 0; part < kParts; ++part) sum += out.part_sums[part];
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
