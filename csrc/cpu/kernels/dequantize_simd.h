// Vectors of small integers (one int32 a lane) for unpacking weights, beside the float vectors of cpu/simd.h.
#pragma once

#include <cstddef>

#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

template <typename T>
inline T load_as(const std::byte* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
}

#if defined(__AVX2__)

struct TwoFloats {
    __m128 v;  // in the low half
};
// Two halves; four bytes after them are read as well.
inline TwoFloats load_two_f16(const std::byte* p) {
    // By the form that reads memory, which gcc 12 does not choose: it needs no shuffle.
    __m128 pair;
    asm("vcvtph2ps %1, %0" : "=v"(pair) : "m"(*reinterpret_cast<const char (*)[8]>(p)));
    return {pair};
}
inline void store_two(float* p, TwoFloats a) { _mm_storel_pi(reinterpret_cast<__m64*>(p), a.v); }
// out[i] = byte i of codes times the first factor for i < 4, times minus the second for 4 <= i < 8.
inline void store_scaled(uint64_t codes, TwoFloats factors, float* out) {
    const __m256 spread =
        _mm256_permutevar8x32_ps(_mm256_castps128_ps256(factors.v), _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
    const __m256 signs = _mm256_setr_ps(0.0f, 0.0f, 0.0f, 0.0f, -0.0f, -0.0f, -0.0f, -0.0f);
    const __m256i bytes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(codes)));
    _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_cvtepi32_ps(bytes), _mm256_xor_ps(spread, signs)));
}

#else

struct TwoFloats {
    float first, second;
};
inline TwoFloats load_two_f16(const std::byte* p) {
    return {f16_to_float(load_as<uint16_t>(p)), f16_to_float(load_as<uint16_t>(p + 2))};
}
inline void store_two(float* p, TwoFloats a) {
    p[0] = a.first;
    p[1] = a.second;
}
inline void store_scaled(uint64_t codes, TwoFloats factors, float* out) {
    for (int i = 0; i < 8; ++i)
        out[i] = static_cast<float>(codes >> (8 * i) & 255) * (i < 4 ? factors.first : -factors.second);
}

#endif

#if defined(__AVX512F__)

struct I32 {
    __m512i v;
};
inline I32 load_u8(__m128i bytes) { return {_mm512_cvtepu8_epi32(bytes)}; }
inline I32 load_u8(const std::byte* p) { return load_u8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline I32 load_i8(const std::byte* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline I32 bit_and(I32 a, int32_t mask) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(mask))}; }
inline I32 bit_or(I32 a, I32 b) { return {_mm512_or_si512(a.v, b.v)}; }
inline I32 shift_left(I32 a, int count) { return {_mm512_slli_epi32(a.v, static_cast<unsigned>(count))}; }
inline I32 shift_right(I32 a, int count) { return {_mm512_srli_epi32(a.v, static_cast<unsigned>(count))}; }
inline F32 to_float(I32 a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline I32 add(I32 a, I32 b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline I32 add(I32 a, int32_t b) { return {_mm512_add_epi32(a.v, _mm512_set1_epi32(b))}; }
// The low four bits of `codes` below a fifth: in lane i, bit first_bit + i of `word`. Bits above those are anything.
inline I32 with_fifth_bits(I32 codes, uint32_t word, int64_t first_bit) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i turn = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first_bit) - 4));
    const __m512i fifth = _mm512_rorv_epi32(_mm512_set1_epi32(static_cast<int>(word)), turn);
    return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(16), fifth, codes.v, 0xca)};  // first ? second : third, by bits
}
// The same with bit `bit` of each lane of `flags`.
inline I32 with_fifth_bits(I32 codes, I32 flags, int64_t bit) {
    const __m512i fifth = _mm512_rorv_epi32(flags.v, _mm512_set1_epi32(static_cast<int>(bit) - 4));
    return {_mm512_ternarylogic_epi32(_mm512_set1_epi32(16), fifth, codes.v, 0xca)};
}
inline F32 broadcast_f16(const std::byte* p) { return {_mm512_cvtph_ps(_mm256_set1_epi16(load_as<int16_t>(p)))}; }

// first + i in lane i.
inline F32 count_from(float first) {
    const __m512 lane = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_add_ps(lane, _mm512_set1_ps(first))};
}

// scale * (code - zero) + offset for the low four bits of each code: the sixteen values fill one vector, so that one
// permutation finds them.
template <int kZero>
class FourBitWeights {
  public:
    explicit FourBitWeights(F32 scale) : values_(mul(count_from(-kZero), scale)) {}
    FourBitWeights(F32 scale, F32 offset) : values_(fma(count_from(-kZero), scale, offset)) {}
    F32 operator()(I32 codes) const { return {_mm512_permutexvar_ps(codes.v, values_.v)}; }

  private:
    F32 values_;
};

// The same for the low five bits, by two vectors.
template <int kZero>
class FiveBitWeights {
  public:
    explicit FiveBitWeights(F32 scale)
        : low_(mul(count_from(-kZero), scale)), high_(mul(count_from(16 - kZero), scale)) {}
    FiveBitWeights(F32 scale, F32 offset)
        : low_(fma(count_from(-kZero), scale, offset)), high_(fma(count_from(16 - kZero), scale, offset)) {}
    F32 operator()(I32 codes) const { return {_mm512_permutex2var_ps(low_.v, codes.v, high_.v)}; }

  private:
    F32 low_, high_;
};

#elif defined(__AVX2__)

struct I32 {
    __m256i v;
};
inline I32 load_u8(__m128i bytes) { return {_mm256_cvtepu8_epi32(bytes)}; }  // its low half
inline I32 load_u8(const std::byte* p) { return load_u8(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline I32 load_i8(const std::byte* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
}
inline I32 bit_and(I32 a, int32_t mask) { return {_mm256_and_si256(a.v, _mm256_set1_epi32(mask))}; }
inline I32 bit_or(I32 a, I32 b) { return {_mm256_or_si256(a.v, b.v)}; }
inline I32 shift_left(I32 a, int count) { return {_mm256_slli_epi32(a.v, count)}; }
inline I32 shift_right(I32 a, int count) { return {_mm256_srli_epi32(a.v, count)}; }
inline F32 to_float(I32 a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline I32 add(I32 a, I32 b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline I32 add(I32 a, int32_t b) { return {_mm256_add_epi32(a.v, _mm256_set1_epi32(b))}; }
inline I32 with_fifth_bits(I32 codes, uint32_t word, int64_t first_bit) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i shift = _mm256_add_epi32(lane, _mm256_set1_epi32(static_cast<int>(first_bit)));
    const __m256i fifth = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(word)), shift);
    return bit_or(bit_and(codes, 15), shift_left({fifth}, 4));
}
inline I32 with_fifth_bits(I32 codes, I32 flags, int64_t bit) {
    const __m256i fifth = _mm256_srlv_epi32(flags.v, _mm256_set1_epi32(static_cast<int>(bit)));
    return bit_or(bit_and(codes, 15), shift_left({fifth}, 4));
}
inline F32 broadcast_f16(const std::byte* p) { return {_mm256_cvtph_ps(_mm_set1_epi16(load_as<int16_t>(p)))}; }

#else

struct I32 {
    int32_t v;
};
inline I32 load_u8(const std::byte* p) { return {load_as<uint8_t>(p)}; }
inline I32 load_i8(const std::byte* p) { return {load_as<int8_t>(p)}; }
inline I32 bit_and(I32 a, int32_t mask) { return {a.v & mask}; }
inline I32 bit_or(I32 a, I32 b) { return {a.v | b.v}; }
inline I32 shift_left(I32 a, int count) { return {a.v << count}; }
inline I32 shift_right(I32 a, int count) { return {a.v >> count}; }
inline F32 to_float(I32 a) { return {static_cast<float>(a.v)}; }
inline I32 add(I32 a, I32 b) { return {a.v + b.v}; }
inline I32 add(I32 a, int32_t b) { return {a.v + b}; }
inline I32 with_fifth_bits(I32 codes, uint32_t word, int64_t first_bit) {
    return {(codes.v & 15) | static_cast<int32_t>(word >> first_bit << 4)};
}
inline I32 with_fifth_bits(I32 codes, I32 flags, int64_t bit) { return {(codes.v & 15) | (flags.v >> bit << 4)}; }
inline F32 broadcast_f16(const std::byte* p) { return {f16_to_float(load_as<uint16_t>(p))}; }

#endif

#if !defined(__AVX512F__)

template <int kBits, int kZero>
class FewBitWeights {
  public:
    explicit FewBitWeights(F32 scale) : scale_(scale), offset_(mul(scale, broadcast(-kZero))) {}
    FewBitWeights(F32 scale, F32 offset) : scale_(scale), offset_(fma(scale, broadcast(-kZero), offset)) {}
    F32 operator()(I32 codes) const { return fma(to_float(bit_and(codes, (1 << kBits) - 1)), scale_, offset_); }

  private:
    F32 scale_, offset_;
};
template <int kZero>
using FourBitWeights = FewBitWeights<4, kZero>;
template <int kZero>
using FiveBitWeights = FewBitWeights<5, kZero>;

#endif

}  // namespace
GEMMA2_FAST_END_ISA
