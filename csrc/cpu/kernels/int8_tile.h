// The inner loops of the int8 matmul: some tokens' activations times one group of a strip of weights. Products are
// summed in int32, which is exact, so only the order of the float32 sums over parts and groups is felt: it is fixed,
// and the results of every tile agree bit for bit.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/strip_unpack.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Activations of consecutive tokens in one group of columns, and the sums that take the products.
struct TileTokens {
    const int8_t* codes;          // [tokens][128]
    const Outliers* outliers;     // [tokens]
    const uint8_t* has_outliers;  // [tokens + 8]
    const float* scales;          // [tokens]
    const int32_t* sums;          // [tokens], of code + 128 * upper
    const int32_t* part_sums;     // [tokens][8], of 16 codes each
    float* out;                   // [tokens][64]
    bool first;                   // nothing has been summed yet
};

// Memory that is asked for in equal steps. It need not exist.
struct Fetch {
    const std::byte* from = nullptr;
    int64_t bytes = 0, step_bytes = 0;

    void split(int64_t num_steps) { step_bytes = ((bytes + num_steps - 1) / num_steps + 63) / 64 * 64; }
    Fetch take() {
        const Fetch taken{from, step_bytes < bytes ? step_bytes : bytes};
        from += taken.bytes;
        bytes -= taken.bytes;
        return taken;
    }
    void next() {
        const Fetch taken = take();
        for (int64_t i = 0; i < taken.bytes; i += 64) __builtin_prefetch(taken.from + i, 0, 2);
    }
};

// The sum of the activations that meet one part: outliers whole where it is the only one, else without their upper
// digits.
template <int64_t kParts>
inline int32_t code_sum(const TileTokens& tokens, int64_t token, int64_t part) {
    if constexpr (kParts == 1) return tokens.sums[token];
    const int32_t* sums = tokens.part_sums + token * 8;
    if constexpr (kParts == 4) return sums[2 * part] + sums[2 * part + 1];
    return sums[part];
}

// multiply_codes: sums[t][row] = start[t] + sum over kSteps * 4 columns of (code - offset) * x, where the offset is
// that of the instruction set (see kOffset). kFetches asks for the memory after the codes.

#if defined(__AVX512VNNI__)

constexpr int64_t kTileTokens = 6;
template <int32_t kZero>
inline constexpr int32_t kOffset = 0;
using Int32s = __m512i;
using Bytes = __m512i;
inline Int32s spread(const void* p) { return _mm512_set1_epi32(load_as<int32_t>(static_cast<const std::byte*>(p))); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store_int32s(int32_t* p, Int32s a) { _mm512_storeu_si512(p, a); }
template <int32_t>
inline Int32s add_products(Int32s sums, Bytes codes, Bytes x) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(x));  // gcc copies the sums around the intrinsic
    return sums;
}
constexpr bool kRoomForWideCodes = true;  // products of codes above 128 keep all their bits
inline Bytes and_bytes(Bytes a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi8(static_cast<char>(mask))); }
inline Bytes shift_right_4(Bytes a) { return _mm512_srli_epi32(a, 4); }
// Lanes of two 16-bit numbers: a / 2^shift and b / 2^shift, which both fit; sums + their products, added up.
inline Int32s pair_of(Int32s a, Int32s b, int shift) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, static_cast<unsigned>(shift)),
                                   _mm512_slli_epi32(b, static_cast<unsigned>(16 - shift)));
}
inline Int32s pair_minus(Int32s a, int16_t b) { return _mm512_sub_epi16(a, _mm512_set1_epi16(b)); }
inline Int32s add_pair_products(Int32s sums, Int32s a, Int32s b) { return _mm512_dpwssd_epi32(sums, a, b); }

// Written out: gcc 12 keeps half of the sums on the stack and copies around every product. zmm0 to 23 are the sums,
// four a token; zmm24 to 27 the codes of four columns and 64 rows; zmm28 four columns of a token.
// clang-format off
#define START(t, a, b, c, d)                        \
    "vpbroadcastd " #t "*4(%[start]), %%zmm" #a "\n" \
    "vpbroadcastd " #t "*4(%[start]), %%zmm" #b "\n" \
    "vpbroadcastd " #t "*4(%[start]), %%zmm" #c "\n" \
    "vpbroadcastd " #t "*4(%[start]), %%zmm" #d "\n"
#define MULTIPLY(t, a, b, c, d)                   \
    "vpbroadcastd " #t "*128(%[x]), %%zmm28\n"    \
    "vpdpbusd %%zmm28, %%zmm24, %%zmm" #a "\n"    \
    "vpdpbusd %%zmm28, %%zmm25, %%zmm" #b "\n"    \
    "vpdpbusd %%zmm28, %%zmm26, %%zmm" #c "\n"    \
    "vpdpbusd %%zmm28, %%zmm27, %%zmm" #d "\n"
#define STORE(t, a, b, c, d)                            \
    "vmovdqu64 %%zmm" #a ", " #t "*256(%[sums])\n"      \
    "vmovdqu64 %%zmm" #b ", " #t "*256+64(%[sums])\n"   \
    "vmovdqu64 %%zmm" #c ", " #t "*256+128(%[sums])\n"  \
    "vmovdqu64 %%zmm" #d ", " #t "*256+192(%[sums])\n"
#define FETCH                               \
    "prefetcht1 %c[ahead](%[codes])\n"      \
    "prefetcht1 %c[ahead]+64(%[codes])\n"   \
    "prefetcht1 %c[ahead]+128(%[codes])\n"  \
    "prefetcht1 %c[ahead]+192(%[codes])\n"
// clang-format on
#define TOKENS_1(DO) DO(0, 0, 1, 2, 3)
#define TOKENS_2(DO) TOKENS_1(DO) DO(1, 4, 5, 6, 7)
#define TOKENS_3(DO) TOKENS_2(DO) DO(2, 8, 9, 10, 11)
#define TOKENS_4(DO) TOKENS_3(DO) DO(3, 12, 13, 14, 15)
#define TOKENS_5(DO) TOKENS_4(DO) DO(4, 16, 17, 18, 19)
#define TOKENS_6(DO) TOKENS_5(DO) DO(5, 20, 21, 22, 23)
#define TILE(TOKENS, FETCHES) \
    asm volatile(TOKENS(START)                                                                                     \
                 "1:\n"                                                                                            \
                 "vmovdqu64 (%[codes]), %%zmm24\n"                                                                 \
                 "vmovdqu64 64(%[codes]), %%zmm25\n"                                                               \
                 "vmovdqu64 128(%[codes]), %%zmm26\n"                                                              \
                 "vmovdqu64 192(%[codes]), %%zmm27\n" FETCHES TOKENS(MULTIPLY)                                     \
                 "add $256, %[codes]\n"                                                                            \
                 "add $4, %[x]\n"                                                                                  \
                 "cmp %[end], %[codes]\n"                                                                          \
                 "jne 1b\n" TOKENS(STORE)                                                                          \
                 : [codes] "+r"(codes), [x] "+r"(x)                                                                \
                 : [end] "r"(codes + kSteps * kStepCodes), [start] "r"(start), [sums] "r"(sums),                   \
                   [ahead] "i"(kFetchBytes)                                                                        \
                 : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", \
                   "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19",       \
                   "zmm20", "zmm21", "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28")

template <int kTokens, int32_t, int64_t kSteps, bool kFetches>
inline void multiply_codes(const uint8_t* codes, const int8_t* x, const int32_t* start, int32_t* sums) {
    if constexpr (kTokens == 1 && kFetches)
        TILE(TOKENS_1, FETCH);
    else if constexpr (kTokens == 1)
        TILE(TOKENS_1, );
    else if constexpr (kTokens == 2 && kFetches)
        TILE(TOKENS_2, FETCH);
    else if constexpr (kTokens == 2)
        TILE(TOKENS_2, );
    else if constexpr (kTokens == 3 && kFetches)
        TILE(TOKENS_3, FETCH);
    else if constexpr (kTokens == 3)
        TILE(TOKENS_3, );
    else if constexpr (kTokens == 4 && kFetches)
        TILE(TOKENS_4, FETCH);
    else if constexpr (kTokens == 4)
        TILE(TOKENS_4, );
    else if constexpr (kTokens == 5 && kFetches)
        TILE(TOKENS_5, FETCH);
    else if constexpr (kTokens == 5)
        TILE(TOKENS_5, );
    else if constexpr (kFetches)
        TILE(TOKENS_6, FETCH);
    else
        TILE(TOKENS_6, );
}

#undef START
#undef MULTIPLY
#undef STORE
#undef FETCH
#undef TOKENS_1
#undef TOKENS_2
#undef TOKENS_3
#undef TOKENS_4
#undef TOKENS_5
#undef TOKENS_6
#undef TILE

#else

#if defined(__AVX2__)

#if defined(__AVXVNNI__)
constexpr int64_t kTileTokens = 3;
#else
constexpr int64_t kTileTokens = 2;
#endif
using Int32s = __m256i;
using Bytes = __m256i;
inline Int32s spread(const void* p) { return _mm256_set1_epi32(load_as<int32_t>(static_cast<const std::byte*>(p))); }
inline Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_int32s(int32_t* p, Int32s a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
inline Bytes and_bytes(Bytes a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi8(static_cast<char>(mask))); }
inline Bytes shift_right_4(Bytes a) { return _mm256_srli_epi32(a, 4); }
inline Int32s pair_of(Int32s a, Int32s b, int shift) {
    return _mm256_blend_epi16(_mm256_srli_epi32(a, shift), _mm256_slli_epi32(b, 16 - shift), 0xaa);
}
inline Int32s pair_minus(Int32s a, int16_t b) { return _mm256_sub_epi16(a, _mm256_set1_epi16(b)); }
inline Int32s add_pair_products(Int32s sums, Int32s a, Int32s b) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b));
}

#if defined(__AVXVNNI__)
template <int32_t kZero>
inline constexpr int32_t kOffset = 0;
template <int32_t>
inline Int32s add_products(Int32s sums, Bytes codes, Bytes x) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(codes), "x"(x));
    return sums;
}
constexpr bool kRoomForWideCodes = true;
#else
constexpr bool kRoomForWideCodes = false;
// Pairs of products are summed in 16 bits. Codes of 8 bits could overflow that: they are centred, and the sign moves
// from the weight to the activation.
template <int32_t kZero>
inline constexpr int32_t kOffset = kZero == 128 ? 128 : 0;
template <int32_t kZero>
inline Int32s add_products(Int32s sums, Bytes codes, Bytes x) {
    if constexpr (kZero == 128) {
        const Bytes centred = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
        x = _mm256_sign_epi8(x, centred);
        codes = _mm256_abs_epi8(centred);
    }
    const __m256i pairs = _mm256_maddubs_epi16(codes, x);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif

#else

constexpr int64_t kTileTokens = 1;
template <int32_t kZero>
inline constexpr int32_t kOffset = 0;
using Int32s = int32_t;
using Bytes = uint32_t;
inline Int32s spread(const void* p) { return load_as<int32_t>(static_cast<const std::byte*>(p)); }
inline Bytes load_bytes(const uint8_t* p) { return load_as<uint32_t>(reinterpret_cast<const std::byte*>(p)); }
inline void store_int32s(int32_t* p, Int32s a) { *p = a; }
constexpr bool kRoomForWideCodes = true;
inline Bytes and_bytes(Bytes a, int mask) { return a & static_cast<Bytes>(mask) * 0x01010101u; }
inline Bytes shift_right_4(Bytes a) { return a >> 4; }
inline Int32s pair_of(Int32s a, Int32s b, int shift) { return (a >> shift & 0xffff) | b >> shift << 16; }
inline Int32s pair_minus(Int32s a, int16_t b) { return pair_of(a - b, (a >> 16) - b, 0); }
inline Int32s add_pair_products(Int32s sums, Int32s a, Int32s b) {
    return sums + static_cast<int16_t>(a) * static_cast<int16_t>(b) + (a >> 16) * (b >> 16);
}
template <int32_t>
inline Int32s add_products(Int32s sums, Bytes codes, Bytes x) {
    for (int shift = 0; shift < 32; shift += 8)
        sums += static_cast<int32_t>(codes >> shift & 255) * static_cast<int8_t>(x >> shift & 255);
    return sums;
}

#endif

constexpr int64_t kTileVectors = 4;

template <int kTokens, int32_t kZero, int64_t kSteps, bool kFetches>
inline void multiply_codes(const uint8_t* codes, const int8_t* x, const int32_t* start, int32_t* sums) {
    for (int64_t row = 0; row < kStripRows; row += kTileVectors * kLanes) {
        Int32s tile[kTokens][kTileVectors];
        GEMMA2_FAST_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kTileVectors; ++v) tile[t][v] = spread(start + t);
        }
        const uint8_t* step_codes = codes + row * 4;
        for (int64_t step = 0; step < kSteps; ++step, step_codes += kStepCodes) {
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kTileVectors; ++v) {
                const Bytes of_rows = load_bytes(step_codes + v * kLanes * 4);
                if constexpr (kFetches) fetch_ahead(step_codes + v * kLanes * 4);
                GEMMA2_FAST_UNROLL
                for (int t = 0; t < kTokens; ++t)
                    tile[t][v] = add_products<kZero>(tile[t][v], of_rows, spread(x + t * kGroupCols + step * 4));
            }
        }
        GEMMA2_FAST_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kTileVectors; ++v) store_int32s(sums + t * kStripRows + row + v * kLanes, tile[t][v]);
        }
    }
}

#endif

inline I32 load_int32s(const int32_t* p) { return {load_as<decltype(I32::v)>(reinterpret_cast<const std::byte*>(p))}; }

inline __attribute__((always_inline)) TileTokens after(const TileTokens& tokens, int64_t count) {
    return {.codes = tokens.codes + count * kGroupCols,
            .outliers = tokens.outliers + count,
            .has_outliers = tokens.has_outliers + count,
            .scales = tokens.scales + count,
            .sums = tokens.sums + count,
            .part_sums = tokens.part_sums + count * kMaxParts,
            .out = tokens.out + count * kStripRows,
            .first = tokens.first};
}

// The same from a later row of the strip on.
inline Group after_rows(const Group& group, int64_t rows) {
    return {group.codes + rows * 4, group.scales + rows, group.minimums == nullptr ? nullptr : group.minimums + rows};
}

// How many vectors of rows are worked on at once.
template <int64_t kRows>
inline constexpr int kVectors = kRows / kLanes < 4 ? static_cast<int>(kRows / kLanes) : 4;

// Products of the codes of some vectors of rows with what the code of an outlier leaves over.
template <typename Strips, int kCount>
inline __attribute__((always_inline)) void add_outlier(const uint8_t* codes, const Outliers& outliers, int index,
                                                       Int32s (&sums)[kCount]) {
    const Bytes upper = spread(outliers.upper[index]);
    GEMMA2_FAST_UNROLL
    for (int v = 0; v < kCount; ++v)
        sums[v] = add_products<Strips::kZero>(
            sums[v], load_bytes(codes + outliers.step[index] * kStepCodes + v * kLanes * 4), upper);
}

// Calls visit(token) for those that have outliers: few, so a token without costs nothing.
template <typename Visit>
inline void for_outliers(const TileTokens& tokens, int64_t num_tokens, Visit visit) {
    for (int64_t first = 0; first < num_tokens; first += 8) {
        uint64_t flags;
        std::memcpy(&flags, tokens.has_outliers + first, sizeof flags);
        if (num_tokens - first < 8) flags &= (uint64_t{1} << (8 * (num_tokens - first))) - 1;
        for (; flags != 0; flags &= flags - 1) visit(first + __builtin_ctzll(flags) / 8);
    }
}

// sums [tokens][kRows] += 128 * products of the outliers, where a group is one part. Sums start from whole activations:
// these products need no centring.
template <typename Strips, int64_t kRows>
inline void add_outliers_to_sums(const Group& group, const TileTokens& tokens, int64_t num_tokens, int32_t* sums) {
    constexpr int kCount = kVectors<kRows>;
    for_outliers(tokens, num_tokens, [&](int64_t t) {
        for (int64_t row = 0; row < kRows; row += kCount * kLanes) {
            Int32s products[kCount] = {};
            add_outlier<Strips>(group.codes + row * 4, tokens.outliers[t], 0, products);
            add_outlier<Strips>(group.codes + row * 4, tokens.outliers[t], 1, products);
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kCount; ++v) {
                int32_t* sum = sums + t * kRows + row + v * kLanes;
                store_int32s(sum, add(load_int32s(sum), shift_left(I32{products[v]}, 7)).v);
            }
        }
    });
}

// out += (scales * products + minimums * digit) * 128 of the outliers, where each may belong to another part.
template <typename Strips, int64_t kRows>
inline void add_outliers(const Group& group, const TileTokens& tokens, int64_t num_tokens) {
    constexpr int32_t kCentre = kOffset<Strips::kZero> - Strips::kZero;
    constexpr int kCount = kVectors<kRows>;
    for_outliers(tokens, num_tokens, [&](int64_t t) {
        const Outliers& outliers = tokens.outliers[t];
        const float x_scale = 128 * tokens.scales[t];
        for (int i = 0; i < 2; ++i) {
            const int64_t part = outliers.step[i] / (kGroupCols / 4 / Strips::kParts);
            const int32_t start = kCentre * outliers.digit[i];
            for (int64_t row = 0; row < kRows; row += kCount * kLanes) {
                Int32s products[kCount];
                for (Int32s& product : products) product = spread(&start);
                add_outlier<Strips>(group.codes + row * 4, outliers, i, products);
                const int64_t place = part * kStripRows + row;
                float* out = tokens.out + t * kStripRows + row;
                GEMMA2_FAST_UNROLL
                for (int v = 0; v < kCount; ++v) {
                    const F32 scale = mul(load(group.scales + place + v * kLanes), broadcast(x_scale));
                    F32 total = fma(to_float(I32{products[v]}), scale, load(out + v * kLanes));
                    if constexpr (Strips::kMinimums) {
                        const F32 x = broadcast(x_scale * static_cast<float>(outliers.digit[i]));
                        total = fma(load(group.minimums + place + v * kLanes), x, total);
                    }
                    store(out + v * kLanes, total);
                }
            }
        }
    });
}

// out += scales * sums [tokens][kRows] (+ minimums * sum of x), for one part. kCentres when the sums still count codes
// from 0.
template <typename Strips, int64_t kRows, bool kCentres>
inline void add_part(const Group& group, const TileTokens& tokens, int64_t num_tokens, int64_t part,
                     const int32_t* sums) {
    constexpr int kCount = kVectors<kRows>;
    const bool first = tokens.first && part == 0;
    for (int64_t row = 0; row < kRows; row += kCount * kLanes) {
        F32 scales[kCount], minimums[kCount];
        const int64_t place = part * kStripRows + row;
        GEMMA2_FAST_UNROLL
        for (int v = 0; v < kCount; ++v) {
            scales[v] = load(group.scales + place + v * kLanes);
            if constexpr (Strips::kMinimums) minimums[v] = load(group.minimums + place + v * kLanes);
        }
        for (int64_t t = 0; t < num_tokens; ++t) {
            const F32 x_scale = broadcast(tokens.scales[t]);
            F32 x_sum{};
            if constexpr (Strips::kMinimums)
                x_sum = mul(x_scale, broadcast(static_cast<float>(code_sum<Strips::kParts>(tokens, t, part))));
            I32 of_rows[kCount];
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kCount; ++v) of_rows[v] = load_int32s(sums + t * kRows + row + v * kLanes);
            if constexpr (kCentres) {
                const int32_t start = -Strips::kZero * code_sum<Strips::kParts>(tokens, t, part);
                GEMMA2_FAST_UNROLL
                for (int v = 0; v < kCount; ++v) of_rows[v] = add(of_rows[v], start);
            }
            float* out = tokens.out + t * kStripRows + row;
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kCount; ++v) {
                F32 total = first ? broadcast(0) : load(out + v * kLanes);
                total = fma(to_float(of_rows[v]), mul(scales[v], x_scale), total);
                if constexpr (Strips::kMinimums) total = fma(minimums[v], x_sum, total);
                store(out + v * kLanes, total);
            }
        }
    }
}

// What the sums of a part start from, so that they count codes from the code of zero.
template <typename Strips, int32_t kOwnOffset>
inline void start_sums(const TileTokens& tokens, int64_t num_tokens, int64_t part, int32_t* start) {
    for (int64_t t = 0; t < num_tokens; ++t)
        start[t] = (kOwnOffset - Strips::kZero) * code_sum<Strips::kParts>(tokens, t, part);
}

template <typename Strips, bool kFetches, int kTokens>
__attribute__((noinline)) void int8_tile(const Group& group, const TileTokens& tokens) {
    constexpr int64_t kPartSteps = kGroupCols / 4 / Strips::kParts;
    alignas(64) int32_t sums[kTokens * kStripRows];
    for (int64_t part = 0; part < Strips::kParts; ++part) {
        int32_t start[kTokens];
        start_sums<Strips, kOffset<Strips::kZero>>(tokens, kTokens, part, start);
        multiply_codes<kTokens, Strips::kZero, kPartSteps, kFetches>(group.codes + part * kPartSteps * kStepCodes,
                                                                     tokens.codes + part * kPartSteps * 4, start, sums);
        if constexpr (Strips::kParts == 1) add_outliers_to_sums<Strips, kStripRows>(group, tokens, kTokens, sums);
        add_part<Strips, kStripRows, false>(group, tokens, kTokens, part, sums);
    }
    if constexpr (Strips::kParts > 1) add_outliers<Strips, kStripRows>(group, tokens, kTokens);
}

template <typename Strips, bool kFetches, int kTokens = 1>
void run_int8_tile(int64_t num_tokens, const Group& group, const TileTokens& tokens) {
    if (num_tokens == kTokens)
        int8_tile<Strips, kFetches, kTokens>(group, tokens);
    else if constexpr (kTokens < kTileTokens)
        run_int8_tile<Strips, kFetches, kTokens + 1>(num_tokens, group, tokens);
}

}  // namespace
GEMMA2_FAST_END_ISA
