#include "cpu/ceilings.h"

#include "cpu/kernels/amx_tiles.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Enough independent chains to hide the latency of two units (4 to 5 cycles each).
constexpr int kChains = 12;

// Makes the compiler believe that a register changed, so that it neither drops nor rearranges the loop.
template <typename Register>
inline void keep(Register& value) {
    asm volatile("" : "+x"(value));
}

uint64_t read(const std::byte* data, int64_t num_bytes) {
    constexpr int64_t kStepBytes = 1024, kAheadBytes = 2048;
    uint64_t sum = 0;
    for (int64_t i = 0; i < num_bytes; i += kStepBytes) {
        for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(data + i + kAheadBytes + line);
#if defined(__AVX512F__)
        __m512i lanes = _mm512_setzero_si512();
        for (int64_t j = 0; j < kStepBytes; j += 64) lanes = _mm512_xor_si512(lanes, _mm512_loadu_si512(data + i + j));
        const __m128i folded = _mm_xor_si128(_mm512_castsi512_si128(lanes), _mm512_extracti32x4_epi32(lanes, 2));
        sum += static_cast<uint64_t>(_mm_cvtsi128_si64(folded));
#elif defined(__AVX2__)
        __m256i lanes = _mm256_setzero_si256();
        for (int64_t j = 0; j < kStepBytes; j += 32)
            lanes = _mm256_xor_si256(lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i + j)));
        sum += static_cast<uint64_t>(_mm_cvtsi128_si64(_mm256_castsi256_si128(lanes)));
#else
        for (int64_t j = 0; j < kStepBytes; j += 8) {
            uint64_t word;
            std::memcpy(&word, data + i + j, sizeof word);
            sum ^= word;
        }
#endif
    }
    return sum;
}

int64_t multiply_add(int64_t wanted) {
    F32 sums[kChains];
    GEMMA2_FAST_UNROLL
    for (F32& sum : sums) sum = broadcast(1);
    const F32 factor = broadcast(0.5f), term = broadcast(0.25f);
    int64_t done = 0;
    for (; done < wanted; done += kChains * kLanes) {
        GEMMA2_FAST_UNROLL
        for (F32& sum : sums) {
            sum = fma(sum, factor, term);
            keep(sum.v);
        }
    }
    return done;
}

int64_t multiply_add_bytes(int64_t wanted) {
    int64_t done = 0;
#if defined(__AMX_INT8__)
    const AmxTiles tiles(64);
    alignas(64) static const uint8_t bytes[kAmxRows * 64] = {};
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, bytes, 64);
    _tile_loadd(6, bytes, 64);
    for (; done < wanted; done += 4 * kAmxRows * kAmxRows * 64) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 6);
        _tile_dpbsud(2, 4, 6);
        _tile_dpbsud(3, 4, 6);
    }
#elif defined(__AVX512VNNI__)
    __m512i sums[kChains];
    GEMMA2_FAST_UNROLL
    for (__m512i& sum : sums) sum = _mm512_setzero_si512();
    const __m512i bytes = _mm512_set1_epi8(3);
    for (; done < wanted; done += kChains * 64) {
        GEMMA2_FAST_UNROLL
        for (__m512i& sum : sums) {
            sum = _mm512_dpbusd_epi32(sum, bytes, bytes);
            keep(sum);
        }
    }
#elif defined(__AVXVNNI__)
    __m256i sums[kChains];
    GEMMA2_FAST_UNROLL
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    const __m256i bytes = _mm256_set1_epi8(3);
    for (; done < wanted; done += kChains * 32) {
        GEMMA2_FAST_UNROLL
        for (__m256i& sum : sums) {
            sum = _mm256_dpbusd_avx_epi32(sum, bytes, bytes);
            keep(sum);
        }
    }
#elif defined(__AVX2__)
    __m256i sums[kChains];
    GEMMA2_FAST_UNROLL
    for (__m256i& sum : sums) sum = _mm256_setzero_si256();
    const __m256i bytes = _mm256_set1_epi8(3), ones = _mm256_set1_epi16(1);
    for (; done < wanted; done += kChains * 32) {
        GEMMA2_FAST_UNROLL
        for (__m256i& sum : sums) {
            __m256i pairs = bytes;
            keep(pairs);
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(pairs, bytes), ones));
            keep(sum);
        }
    }
#else
    int32_t sums[kChains] = {};
    for (; done < wanted; done += kChains) {
        GEMMA2_FAST_UNROLL
        for (int32_t& sum : sums) {
            int32_t product = 3;
            asm volatile("" : "+r"(product));
            sum += product * product;
            asm volatile("" : "+r"(sum));
        }
    }
#endif
    return done;
}

}  // namespace

extern const Ceilings ceilings;
const Ceilings ceilings{.read = read, .multiply_add = multiply_add, .multiply_add_bytes = multiply_add_bytes};

GEMMA2_FAST_END_ISA
