// Products of 16-bit codes with bytes of int8 pages, summed in int32: the same numbers on every instruction set.
//
// Four bytes of a column meet four codes of a row. VNNI multiplies bytes, so a code is split into 256 * high + low, and
// each half has sums of its own until the end; without it the bytes are widened to 16 bits.
#pragma once

#include "cpu/kernels/attention_block.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

#if defined(__AVX512F__)
struct Ints {
    __m512i v;
};
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints shift_left_8(Ints a) { return {_mm512_slli_epi32(a.v, 8)}; }
inline Ints broadcast_int(int32_t a) { return {_mm512_set1_epi32(a)}; }
inline Ints load_ints(const std::byte* p) { return {_mm512_loadu_si512(p)}; }
inline Ints load_ints(const float* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(float* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline F32 to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
#elif defined(__AVX2__)
struct Ints {
    __m256i v;
};
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints shift_left_8(Ints a) { return {_mm256_slli_epi32(a.v, 8)}; }
inline Ints broadcast_int(int32_t a) { return {_mm256_set1_epi32(a)}; }
inline Ints load_ints(const std::byte* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Ints load_ints(const float* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store_ints(float* p, Ints a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline F32 to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
#else
struct Ints {
    int32_t v;
};
inline Ints add(Ints a, Ints b) { return {a.v + b.v}; }
inline Ints broadcast_int(int32_t a) { return {a}; }
inline Ints load_ints(const float* p) {  // that hold integers
    Ints a;
    std::memcpy(&a.v, p, sizeof a.v);
    return a;
}
inline void store_ints(float* p, Ints a) { std::memcpy(p, &a.v, sizeof a.v); }
inline F32 to_float(Ints a) { return {static_cast<float>(a.v)}; }
#endif

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define GEMMA2_FAST_BYTE_PRODUCTS 1
constexpr int64_t kCodeParts = 2;  // high and low
#else
#define GEMMA2_FAST_BYTE_PRODUCTS 0
constexpr int64_t kCodeParts = 1;
#endif
constexpr int64_t kCodeBytes = 2;  // of all parts
constexpr int64_t kStepCodes = 4;
constexpr int64_t kStepColumnBytes = kRowElements * kStepCodes;  // of a page

// Which operand is signed, and where the codes lie. Keys: unsigned columns; a step's codes of all rows together.
// Values: signed columns, codes of at most 32767; each row's codes together, high parts first.
enum class Operand { kKeys, kValues };

template <int kRows, Operand kOperand>
struct CodeLayout {
    static constexpr bool kTogether = kOperand == Operand::kKeys;
    static constexpr int64_t kRowStride = kCodeBytes * (kTogether ? kStepCodes : kBlockTokens);
    static constexpr int64_t kPartStride = kRowStride / kCodeParts;
    static constexpr int64_t kStepStride = kTogether ? kRows * kRowStride : kStepCodes * kCodeBytes / kCodeParts;
};

// Four signed codes of a step and row, the low 16 bits of each.
inline void put_key_codes(const uint32_t* codes, std::byte* to, int64_t part_stride) {
    for (int64_t i = 0; i < kStepCodes; ++i) {
#if GEMMA2_FAST_BYTE_PRODUCTS
        to[i] = static_cast<std::byte>((codes[i] + 128) >> 8);  // the low part is signed too
        to[part_stride + i] = static_cast<std::byte>(codes[i]);
#else
        (void)part_stride;
        const auto code = static_cast<uint16_t>(codes[i]);
        std::memcpy(to + i * kCodeBytes, &code, sizeof code);
#endif
    }
}

// The codes of kLanes consecutive keys, the low 16 bits of each; row: the row's codes.
inline void put_value_codes(F32 codes, std::byte* row, int64_t key) {
#if defined(__AVX512F__)
    const __m512i bits = _mm512_castps_si512(codes.v);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + key), _mm512_cvtepi32_epi8(_mm512_srli_epi32(bits, 8)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + kBlockTokens + key), _mm512_cvtepi32_epi8(bits));
#elif defined(__AVX2__)
    // The low halves of the lanes, 0 to 3 and 4 to 7 beside one another.
    const __m256i halves = _mm256_shuffle_epi8(
        _mm256_castps_si256(codes.v), _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1, 0, 1,
                                                       4, 5, 8, 9, 12, 13, -1, -1, -1, -1, -1, -1, -1, -1));
    const __m128i words = _mm256_castsi256_si128(_mm256_permute4x64_epi64(halves, 0x08));
#if GEMMA2_FAST_BYTE_PRODUCTS
    const __m128i bytes = _mm_shuffle_epi8(words, _mm_setr_epi8(1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(row + key), bytes);
    _mm_storeh_pd(reinterpret_cast<double*>(row + kBlockTokens + key), _mm_castsi128_pd(bytes));
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + key * kCodeBytes), words);
#endif
#else
    uint16_t code;
    std::memcpy(&code, &codes.v, sizeof code);
    std::memcpy(row + key * kCodeBytes, &code, sizeof code);
#endif
}

#if GEMMA2_FAST_BYTE_PRODUCTS
// Assembly, because gcc 12 copies sums around the intrinsic and loads columns again for every row: half the speed.
template <Operand kOperand>
inline __attribute__((always_inline)) Ints add_products(Ints sum, Ints codes, Ints columns) {
    const Ints u = kOperand == Operand::kKeys ? columns : codes, s = kOperand == Operand::kKeys ? codes : columns;
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(u.v), "v"(s.v));
#else
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum.v) : "x"(u.v), "x"(s.v));
#endif
    return sum;
}

template <int kRows, Operand kOperand>
class IntegerProducts {
  public:
    static constexpr int64_t kColumns = 2 * kLanes;  // two vectors of columns

    inline __attribute__((always_inline)) IntegerProducts() {
        GEMMA2_FAST_UNROLL
        for (int i = 0; i < 2 * kRows; ++i) left_[i] = right_[i] = broadcast_int(0);
    }

    // columns: of the first of at least one step, kStepColumnBytes apart.
    inline __attribute__((always_inline)) void add_steps(const std::byte* codes, const std::byte* columns,
                                                         int64_t steps, Fetch fetched) {
        using Layout = CodeLayout<kRows, kOperand>;
        do {
            fetched.next<kStepColumnBytes>();
            const Ints left = load_ints(columns), right = load_ints(columns + 4 * kLanes);
            GEMMA2_FAST_UNROLL
            for (int i = 0; i < 2 * kRows; ++i) {
                int32_t four;
                std::memcpy(&four, codes + i / 2 * Layout::kRowStride + i % 2 * Layout::kPartStride, sizeof four);
                const Ints code = broadcast_int(four);
                left_[i] = add_products<kOperand>(left_[i], code, left);
                right_[i] = add_products<kOperand>(right_[i], code, right);
            }
            codes += Layout::kStepStride;
            columns += kStepColumnBytes;
        } while (--steps > 0);
    }

    // take(row, first column, sums of kLanes columns)
    template <typename Take>
    inline __attribute__((always_inline)) void finish(const Take& take) {
        GEMMA2_FAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
            take(r, 0, add(shift_left_8(left_[2 * r]), left_[2 * r + 1]));
            take(r, kLanes, add(shift_left_8(right_[2 * r]), right_[2 * r + 1]));
        }
    }

  private:
    Ints left_[2 * kRows], right_[2 * kRows];  // of each row the high parts, then the low ones
};

#elif defined(__AVX2__)

template <int kRows, Operand kOperand>
class IntegerProducts {
  public:
    static constexpr int64_t kColumns = kLanes;

    inline __attribute__((always_inline)) IntegerProducts() {
        GEMMA2_FAST_UNROLL
        for (int r = 0; r < kRows; ++r) left_[r] = right_[r] = broadcast_int(0);
    }

    inline __attribute__((always_inline)) void add_steps(const std::byte* codes, const std::byte* columns,
                                                         int64_t steps, Fetch fetched) {
        using Layout = CodeLayout<kRows, kOperand>;
        do {
            fetched.next<kStepColumnBytes>();
            const __m256i left = widened(columns), right = widened(columns + 16);
            GEMMA2_FAST_UNROLL
            for (int r = 0; r < kRows; ++r) {
                long long four;
                std::memcpy(&four, codes + r * Layout::kRowStride, sizeof four);
                const __m256i code = _mm256_set1_epi64x(four);
                left_[r] = add(left_[r], {_mm256_madd_epi16(code, left)});
                right_[r] = add(right_[r], {_mm256_madd_epi16(code, right)});
            }
            codes += Layout::kStepStride;
            columns += kStepColumnBytes;
        } while (--steps > 0);
    }

    template <typename Take>
    inline __attribute__((always_inline)) void finish(const Take& take) {
        GEMMA2_FAST_UNROLL
        for (int r = 0; r < kRows; ++r) {
            // Each column has two sums; the horizontal add leaves columns 0 1 4 5 2 3 6 7.
            const __m256i mixed = _mm256_hadd_epi32(left_[r].v, right_[r].v);
            take(r, 0, Ints{_mm256_permute4x64_epi64(mixed, 0xd8)});
        }
    }

  private:
    static __m256i widened(const std::byte* p) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
        return kOperand == Operand::kKeys ? _mm256_cvtepu8_epi16(bytes) : _mm256_cvtepi8_epi16(bytes);
    }

    Ints left_[kRows], right_[kRows];
};

#else

template <int kRows, Operand kOperand>
class IntegerProducts {
  public:
    static constexpr int64_t kColumns = 1;

    void add_steps(const std::byte* codes, const std::byte* columns, int64_t steps, Fetch) {
        using Layout = CodeLayout<kRows, kOperand>;
        for (int64_t step = 0; step < steps; ++step, codes += Layout::kStepStride, columns += kStepColumnBytes)
            for (int64_t i = 0; i < kStepCodes; ++i) {
                const auto byte = static_cast<uint8_t>(columns[i]);
                const int32_t column = kOperand == Operand::kKeys ? byte : static_cast<int8_t>(byte);
                for (int r = 0; r < kRows; ++r) {
                    int16_t code;
                    std::memcpy(&code, codes + r * Layout::kRowStride + i * kCodeBytes, sizeof code);
                    sums_[r] += code * column;
                }
            }
    }

    template <typename Take>
    void finish(const Take& take) {
        for (int r = 0; r < kRows; ++r) take(r, 0, Ints{sums_[r]});
    }

  private:
    int32_t sums_[kRows] = {};
};

#endif

}  // namespace
GEMMA2_FAST_END_ISA
