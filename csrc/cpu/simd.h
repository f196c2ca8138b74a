// Vectors of float32 for the kernels, which are compiled once per instruction set with GEMMA2_FAST_ISA set to its name.
// Everything lives in that set's namespace with internal linkage, so that the linker can never merge code of two sets.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// gcc 12 takes the undefined operands inside its own intrinsics for uninitialised variables.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#endif

#define GEMMA2_FAST_BEGIN_ISA \
    namespace gemma2_fast {   \
    namespace GEMMA2_FAST_ISA {
#define GEMMA2_FAST_END_ISA \
    }                       \
    }

// Before a loop whose every turn is to be written out. Checked builds do without: they would compile for minutes.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define GEMMA2_FAST_UNROLL
#else
#define GEMMA2_FAST_UNROLL _Pragma("GCC unroll 16")
#endif

GEMMA2_FAST_BEGIN_ISA
namespace {

#if defined(__AVX512F__)

struct F32 {
    __m512 v;
};
constexpr int64_t kLanes = 16;
inline F32 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F32 a) { _mm512_storeu_ps(p, a.v); }
// The first n of kLanes elements; the others read as zero and are not written.
inline F32 load_first(const float* p, int64_t n) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
inline void store_first(float* p, F32 a, int64_t n) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
inline F32 broadcast(float a) { return {_mm512_set1_ps(a)}; }
inline F32 add(F32 a, F32 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F32 sqrt(F32 a) { return {_mm512_sqrt_ps(a.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }  // a * b + c
inline F32 abs(F32 a) { return {_mm512_abs_ps(a.v)}; }
inline F32 copy_sign(F32 magnitude, F32 sign) {  // magnitude >= 0
    return {_mm512_or_ps(magnitude.v, _mm512_and_ps(sign.v, _mm512_set1_ps(-0.0f)))};
}
inline F32 round_to_nearest(F32 a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline F32 scale_by_power_of_two(F32 a, F32 exponent) { return {_mm512_scalef_ps(a.v, exponent.v)}; }  // a * 2^exponent
inline F32 select_less(F32 a, F32 b, F32 yes, F32 no) {  // lanewise a < b ? yes : no
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
inline F32 load_bf16(const uint16_t* p) {
    return {_mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline F32 load_first_bf16(const uint16_t* p, int64_t n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(
        _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p)), 16))};
}
inline F32 load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}

#elif defined(__AVX2__)

struct F32 {
    __m256 v;
};
constexpr int64_t kLanes = 8;
inline __m256i first_lanes_mask(int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline F32 load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F32 a) { _mm256_storeu_ps(p, a.v); }
inline F32 load_first(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes_mask(n))}; }
inline void store_first(float* p, F32 a, int64_t n) { _mm256_maskstore_ps(p, first_lanes_mask(n), a.v); }
inline F32 broadcast(float a) { return {_mm256_set1_ps(a)}; }
inline F32 add(F32 a, F32 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F32 sub(F32 a, F32 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F32 mul(F32 a, F32 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F32 div(F32 a, F32 b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F32 sqrt(F32 a) { return {_mm256_sqrt_ps(a.v)}; }
inline F32 min(F32 a, F32 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F32 abs(F32 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline F32 copy_sign(F32 magnitude, F32 sign) {  // magnitude >= 0
    return {_mm256_or_ps(magnitude.v, _mm256_and_ps(sign.v, _mm256_set1_ps(-0.0f)))};
}
inline F32 round_to_nearest(F32 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 scale_by_power_of_two(F32 a, F32 exponent) {  // exponent is an integer in [-126, 127]
    __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(exponent.v), _mm256_set1_epi32(127)), 23);
    return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(bits))};
}
inline F32 select_less(F32 a, F32 b, F32 yes, F32 no) {
    return {_mm256_blendv_ps(no.v, yes.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
}
inline F32 load_bf16(const uint16_t* p) {
    return {_mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
inline F32 load_first_bf16(const uint16_t* p, int64_t n) {
    uint16_t first[8] = {};
    std::memcpy(first, p, static_cast<size_t>(n) * sizeof(uint16_t));
    return load_bf16(first);
}
inline F32 load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}

#else

struct F32 {
    float v;
};
constexpr int64_t kLanes = 1;
inline F32 load(const float* p) {  // p may be unaligned, as for the other sets
    F32 a;
    std::memcpy(&a.v, p, sizeof a.v);
    return a;
}
inline void store(float* p, F32 a) { std::memcpy(p, &a.v, sizeof a.v); }
inline F32 load_first(const float* p, int64_t n) { return n > 0 ? load(p) : F32{0}; }
inline void store_first(float* p, F32 a, int64_t n) {
    if (n > 0) *p = a.v;
}
inline F32 broadcast(float a) { return {a}; }
inline F32 add(F32 a, F32 b) { return {a.v + b.v}; }
inline F32 sub(F32 a, F32 b) { return {a.v - b.v}; }
inline F32 mul(F32 a, F32 b) { return {a.v * b.v}; }
inline F32 div(F32 a, F32 b) { return {a.v / b.v}; }
inline F32 sqrt(F32 a) { return {__builtin_sqrtf(a.v)}; }
inline F32 min(F32 a, F32 b) { return {a.v < b.v ? a.v : b.v}; }
inline F32 max(F32 a, F32 b) { return {a.v > b.v ? a.v : b.v}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {a.v * b.v + c.v}; }
inline F32 abs(F32 a) { return {__builtin_fabsf(a.v)}; }
inline F32 copy_sign(F32 magnitude, F32 sign) { return {__builtin_copysignf(magnitude.v, sign.v)}; }
inline F32 round_to_nearest(F32 a) { return {__builtin_rintf(a.v)}; }
inline F32 scale_by_power_of_two(F32 a, F32 exponent) { return {__builtin_ldexpf(a.v, static_cast<int>(exponent.v))}; }
inline F32 select_less(F32 a, F32 b, F32 yes, F32 no) { return a.v < b.v ? yes : no; }
inline float bf16_to_float(uint16_t bits) {
    uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline F32 load_bf16(const uint16_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return {bf16_to_float(bits)};
}
inline float f16_to_float(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
    uint32_t wide = static_cast<uint32_t>(bits & 0x7fff) << 13;
    const bool finite = wide < 0x0f800000u;
    // The exponent keeps its bias of 15 until a power of two lifts it to 127: exact for subnormals too.
    wide += finite ? 0 : 0x70000000u;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    if (finite) value *= 0x1p112f;
    std::memcpy(&wide, &value, sizeof wide);
    wide |= sign;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}
inline F32 load_f16(const uint16_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return {f16_to_float(bits)};
}
inline F32 load_first_bf16(const uint16_t* p, int64_t n) { return n > 0 ? load_bf16(p) : F32{0.0f}; }

#endif

// Sum and maximum over the lanes, always in the same order: halves are folded until one lane is left.
inline float reduce_add(F32 a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
inline float reduce_max(F32 a) {
    float lanes[kLanes];
    store(lanes, a);
    for (int64_t half = kLanes / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    return lanes[0];
}
// out[i] = reduce_add of the i-th vector, by the same additions for the four at once.
inline void reduce_add_four(F32 a, F32 b, F32 c, F32 d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    // Masked forms with every lane wanted: gcc 12 warns of its own unmasked ones.
    const __m512 ab_512 = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, a.v, b.v, 0x44),
                                        _mm512_maskz_shuffle_f32x4(0xffff, a.v, b.v, 0xee));
    const __m512 cd_512 = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, c.v, d.v, 0x44),
                                        _mm512_maskz_shuffle_f32x4(0xffff, c.v, d.v, 0xee));
    const __m512 abcd = _mm512_add_ps(_mm512_maskz_shuffle_f32x4(0xffff, ab_512, cd_512, 0x88),
                                      _mm512_maskz_shuffle_f32x4(0xffff, ab_512, cd_512, 0xdd));
    const __m256 ab = _mm512_maskz_extractf32x8_ps(0xff, abcd, 0), cd = _mm512_maskz_extractf32x8_ps(0xff, abcd, 1);
#else
    const __m256 ab = _mm256_add_ps(_mm256_permute2f128_ps(a.v, b.v, 0x20), _mm256_permute2f128_ps(a.v, b.v, 0x31));
    const __m256 cd = _mm256_add_ps(_mm256_permute2f128_ps(c.v, d.v, 0x20), _mm256_permute2f128_ps(c.v, d.v, 0x31));
#endif
    // Each half of ab and of cd holds one vector's four lanes.
    const __m256 pairs = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
    const __m256 sums = _mm256_add_ps(_mm256_shuffle_ps(pairs, pairs, 0x88), _mm256_shuffle_ps(pairs, pairs, 0xdd));
    const __m128 ac = _mm256_castps256_ps128(sums), bd = _mm256_extractf128_ps(sums, 1);
    _mm_storeu_ps(out, _mm_unpacklo_ps(ac, bd));
#else
    const F32 vectors[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) out[i] = reduce_add(vectors[i]);
#endif
}

}  // namespace
GEMMA2_FAST_END_ISA
