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
    const QuantizedRows* rows;
    int64_t place;  // of the first token's group in them
    float* out;     // [tokens][64], added to

    const int8_t* codes() const { return rows->codes + place * kGroupCols; }
    const Outliers* outliers() const { return rows->outliers + place; }
    const uint8_t* has_outliers() const { return rows->has_outliers + place; }
    const float* scales() const { return rows->scales + place; }
    const int32_t* sums() const { return rows->sums + place; }
    const int32_t* part_sums() const { return rows->part_sums + place * kMaxParts; }
    TileTokens after(int64_t count) const { return {rows, place + count, out + count * kStripRows}; }
    TileTokens of_later_group(int64_t count) const { return {rows, place + count * rows->token_stride, out}; }
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

// The sum of the activations that meet one part.
template <int64_t kParts>
inline int32_t code_sum(const TileTokens& tokens, int64_t token, int64_t part) {
    if constexpr (kParts == 1) return tokens.sums()[token];
    const int32_t* sums = tokens.part_sums() + token * kMaxParts;
    int32_t sum = kParts == 4 ? sums[2 * part] + sums[2 * part + 1] : sums[part];
    if (tokens.has_outliers()[token] != 0)
        for (int i = 0; i < 2; ++i)
            if (tokens.outliers()[token].step[i] / (kGroupCols / 4 / kParts) == part)
                sum += 128 * tokens.outliers()[token].digit[i];
    return sum;
}

// What the int32 sums of some tokens start from.
struct Starts {
    const int32_t* of_tokens;  // [tokens]
    const int32_t* of_rows;    // [tokens][64], where it depends on the row; else null
};

// multiply_codes: with sums[t][row] = start + sum over kSteps * 4 columns of (code - offset) * x, where the offset is
// that of the instruction set (see kOffset),
//   out[t][row] += x_scale[t] * (scale[row] * sums[t][row])   where kWhole: the columns are all that share an x_scale,
//   out[t][row] += scale[row] * sums[t][row]                  else.
// kFetches asks for the memory after the codes.

#if defined(__AVX512VNNI__)

constexpr int64_t kTileTokens = 6;
template <int32_t kZero>
inline constexpr int32_t kOffset = 0;
using Int32s = __m512i;
using Bytes = __m512i;
inline Int32s spread(const void* p) { return _mm512_set1_epi32(load_as<int32_t>(static_cast<const std::byte*>(p))); }
inline Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Int32s load_int32s(const int32_t* p) { return _mm512_loadu_si512(p); }
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
// four a token; zmm24 to 27 the codes of four columns and 64 rows, at last the scales of rows; zmm28 what belongs to a
// token.
// clang-format off
#define SPREAD(t, a, b, c, d)                        \
    "vpbroadcastd " #t "*4(%[start]), %%zmm" #a "\n" \
    "vmovdqa64 %%zmm" #a ", %%zmm" #b "\n"           \
    "vmovdqa64 %%zmm" #a ", %%zmm" #c "\n"           \
    "vmovdqa64 %%zmm" #a ", %%zmm" #d "\n"
#define LOAD(t, a, b, c, d)                            \
    "vmovdqu64 " #t "*256(%[of_rows]), %%zmm" #a "\n"     \
    "vmovdqu64 " #t "*256+64(%[of_rows]), %%zmm" #b "\n"  \
    "vmovdqu64 " #t "*256+128(%[of_rows]), %%zmm" #c "\n" \
    "vmovdqu64 " #t "*256+192(%[of_rows]), %%zmm" #d "\n"
#define MULTIPLY(t, a, b, c, d)                   \
    "vpbroadcastd " #t "*128(%[x]), %%zmm28\n"    \
    "vpdpbusd %%zmm28, %%zmm24, %%zmm" #a "\n"    \
    "vpdpbusd %%zmm28, %%zmm25, %%zmm" #b "\n"    \
    "vpdpbusd %%zmm28, %%zmm26, %%zmm" #c "\n"    \
    "vpdpbusd %%zmm28, %%zmm27, %%zmm" #d "\n"
#define ADD_WHOLE_VECTOR(place, scale, a)                            \
    "vcvtdq2ps %%zmm" #a ", %%zmm" #a "\n"                           \
    "vmulps %%zmm" #scale ", %%zmm" #a ", %%zmm" #a "\n"             \
    "vfmadd213ps " place "(%[out]), %%zmm28, %%zmm" #a "\n"          \
    "vmovups %%zmm" #a ", " place "(%[out])\n"
#define ADD_WHOLE(t, a, b, c, d)                      \
    "vbroadcastss " #t "*4(%[x_scales]), %%zmm28\n"   \
    ADD_WHOLE_VECTOR(#t "*256", 24, a)                \
    ADD_WHOLE_VECTOR(#t "*256+64", 25, b)             \
    ADD_WHOLE_VECTOR(#t "*256+128", 26, c)            \
    ADD_WHOLE_VECTOR(#t "*256+192", 27, d)
#define ADD_PART_VECTOR(place, scale, a)                             \
    "vcvtdq2ps %%zmm" #a ", %%zmm" #a "\n"                           \
    "vfmadd213ps " place "(%[out]), %%zmm" #scale ", %%zmm" #a "\n"  \
    "vmovups %%zmm" #a ", " place "(%[out])\n"
#define ADD_PART(t, a, b, c, d)                       \
    ADD_PART_VECTOR(#t "*256", 24, a)                 \
    ADD_PART_VECTOR(#t "*256+64", 25, b)              \
    ADD_PART_VECTOR(#t "*256+128", 26, c)             \
    ADD_PART_VECTOR(#t "*256+192", 27, d)
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
#define TILE(TOKENS, FETCHES, ADD) \
    asm volatile(                                                                                                  \
        "test %[of_rows], %[of_rows]\n"                                                                            \
        "jne 1f\n" TOKENS(SPREAD)                                                                                  \
        "jmp 2f\n"                                                                                                 \
        "1:\n" TOKENS(LOAD)                                                                                        \
        "2:\n"                                                                                                     \
        "vmovdqu64 (%[codes]), %%zmm24\n"                                                                          \
        "vmovdqu64 64(%[codes]), %%zmm25\n"                                                                        \
        "vmovdqu64 128(%[codes]), %%zmm26\n"                                                                       \
        "vmovdqu64 192(%[codes]), %%zmm27\n" FETCHES TOKENS(MULTIPLY)                                              \
        "add $256, %[codes]\n"                                                                                     \
        "add $4, %[x]\n"                                                                                           \
        "cmp %[end], %[codes]\n"                                                                                   \
        "jne 2b\n"                                                                                                 \
        "vmovups (%[scales]), %%zmm24\n"                                                                           \
        "vmovups 64(%[scales]), %%zmm25\n"                                                                         \
        "vmovups 128(%[scales]), %%zmm26\n"                                                                        \
        "vmovups 192(%[scales]), %%zmm27\n" TOKENS(ADD)                                                            \
        : [codes] "+&r"(codes), [x] "+&r"(x)                                                                       \
        : [end] "r"(codes + kSteps * kStepCodes), [start] "r"(starts.of_tokens), [of_rows] "r"(starts.of_rows),    \
          [scales] "r"(scales), [x_scales] "r"(x_scales), [out] "r"(out), [ahead] "i"(kFetchBytes)                 \
        : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", \
          "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19", "zmm20", "zmm21",       \
          "zmm22", "zmm23", "zmm24", "zmm25", "zmm26", "zmm27", "zmm28")
#define TILES(TOKENS)                   \
    if constexpr (kWhole && kFetches)   \
        TILE(TOKENS, FETCH, ADD_WHOLE); \
    else if constexpr (kWhole)          \
        TILE(TOKENS, , ADD_WHOLE);      \
    else if constexpr (kFetches)        \
        TILE(TOKENS, FETCH, ADD_PART);  \
    else                                \
        TILE(TOKENS, , ADD_PART)

template <int kTokens, int32_t, int64_t kSteps, bool kWhole, bool kFetches>
inline void multiply_codes(const uint8_t* codes, const int8_t* x, const Starts& starts, const float* scales,
                           const float* x_scales, float* out) {
    if constexpr (kTokens == 1) {
        TILES(TOKENS_1);
    } else if constexpr (kTokens == 2) {
        TILES(TOKENS_2);
    } else if constexpr (kTokens == 3) {
        TILES(TOKENS_3);
    } else if constexpr (kTokens == 4) {
        TILES(TOKENS_4);
    } else if constexpr (kTokens == 5) {
        TILES(TOKENS_5);
    } else {
        TILES(TOKENS_6);
    }
}

#undef SPREAD
#undef LOAD
#undef MULTIPLY
#undef ADD_WHOLE_VECTOR
#undef ADD_WHOLE
#undef ADD_PART_VECTOR
#undef ADD_PART
#undef FETCH
#undef TOKENS_1
#undef TOKENS_2
#undef TOKENS_3
#undef TOKENS_4
#undef TOKENS_5
#undef TOKENS_6
#undef TILE
#undef TILES

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
inline Int32s load_int32s(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
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
inline Int32s load_int32s(const int32_t* p) { return *p; }
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

template <int kTokens, int32_t kZero, int64_t kSteps, bool kWhole, bool kFetches>
inline void multiply_codes(const uint8_t* codes, const int8_t* x, const Starts& starts, const float* scales,
                           const float* x_scales, float* out) {
    for (int64_t row = 0; row < kStripRows; row += kTileVectors * kLanes) {
        Int32s tile[kTokens][kTileVectors];
        GEMMA2_FAST_UNROLL
        for (int t = 0; t < kTokens; ++t) {
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kTileVectors; ++v)
                tile[t][v] = starts.of_rows == nullptr
                                 ? spread(starts.of_tokens + t)
                                 : load_int32s(starts.of_rows + t * kStripRows + row + v * kLanes);
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
            for (int v = 0; v < kTileVectors; ++v) {
                const F32 sum = to_float(I32{tile[t][v]}), scale = load(scales + row + v * kLanes);
                float* place = out + t * kStripRows + row + v * kLanes;
                store(place, kWhole ? fma(mul(sum, scale), broadcast(x_scales[t]), load(place))
                                    : fma(sum, scale, load(place)));
            }
        }
    }
}

#endif

// What tokens have outliers: few, so that a group without costs nothing. Calls visit(token).
template <typename Visit>
inline void for_outliers(const TileTokens& tokens, int64_t num_tokens, Visit visit) {
    for (int64_t first = 0; first < num_tokens; first += 8) {
        uint64_t flags;
        std::memcpy(&flags, tokens.has_outliers() + first, sizeof flags);
        if (num_tokens - first < 8) flags &= (uint64_t{1} << (8 * (num_tokens - first))) - 1;
        for (; flags != 0; flags &= flags - 1) visit(first + __builtin_ctzll(flags) / 8);
    }
}

// sums[64] += 128 * products of the codes of a part with what the codes of outliers leave over. What sums start from
// counts activations whole, so that these products need no centring.
template <typename Strips>
inline void add_outliers(const uint8_t* codes, const Outliers& outliers, int64_t part, int32_t* sums) {
    constexpr int kCount = kStripRows / kLanes < 4 ? static_cast<int>(kStripRows / kLanes) : 4;
    for (int i = 0; i < 2; ++i) {
        if (outliers.step[i] / (kGroupCols / 4 / Strips::kParts) != part) continue;
        for (int64_t row = 0; row < kStripRows; row += kCount * kLanes) {
            const uint8_t* of_rows = codes + outliers.step[i] * kStepCodes + row * 4;
            GEMMA2_FAST_UNROLL
            for (int v = 0; v < kCount; ++v) {
                const Int32s products = add_products<Strips::kZero>(Int32s{}, load_bytes(of_rows + v * kLanes * 4),
                                                                    spread(outliers.upper[i]));
                int32_t* sum = sums + row + v * kLanes;
                store_int32s(sum, add(I32{load_int32s(sum)}, shift_left(I32{products}, 7)).v);
            }
        }
    }
}

// The int32 sums of one part start from -zero * (sum of the activations), so that they count codes from the code of
// zero, and from the products of outliers. Fills buffers for it.
template <typename Strips, int kTokens>
inline Starts start_sums(const Group& group, const TileTokens& tokens, int64_t part, int32_t (&of_tokens)[kTokens],
                         int32_t (&of_rows)[kTokens * kStripRows]) {
    constexpr int32_t kCentre = kOffset<Strips::kZero> - Strips::kZero;
    for (int64_t t = 0; t < kTokens; ++t) of_tokens[t] = kCentre * code_sum<Strips::kParts>(tokens, t, part);
    bool spreads = true;
    for_outliers(tokens, kTokens, [&](int64_t token) {
        for (int64_t t = 0; spreads && t < kTokens; ++t)
            for (int64_t row = 0; row < kStripRows; ++row) of_rows[t * kStripRows + row] = of_tokens[t];
        spreads = false;
        add_outliers<Strips>(group.codes, tokens.outliers()[token], part, of_rows + token * kStripRows);
    });
    return {of_tokens, spreads ? nullptr : of_rows};
}

// values[t][row] = sum over parts of minimum * (sum of the activations)
template <typename Strips, int kTokens>
inline void add_minimums(const Group& group, const TileTokens& tokens, float* values) {
    for (int64_t t = 0; t < kTokens; ++t) {
        F32 x_sums[Strips::kParts];
        for (int64_t part = 0; part < Strips::kParts; ++part)
            x_sums[part] = broadcast(static_cast<float>(code_sum<Strips::kParts>(tokens, t, part)));
        for (int64_t row = 0; row < kStripRows; row += kLanes) {
            F32 value = mul(load(group.minimums + row), x_sums[0]);
            for (int64_t part = 1; part < Strips::kParts; ++part)
                value = fma(load(group.minimums + part * kStripRows + row), x_sums[part], value);
            store(values + t * kStripRows + row, value);
        }
    }
}

// What memory has to bring soon: the sums of a tile, and the activations of the next.
template <int kTokens>
inline void fetch_next(const TileTokens& tokens) {
    GEMMA2_FAST_UNROLL
    for (int64_t i = 0; i < kTokens * kStripRows; i += 16) __builtin_prefetch(tokens.out + i);
    GEMMA2_FAST_UNROLL
    for (int64_t i = 0; i < kTokens * kGroupCols; i += 64)
        __builtin_prefetch(tokens.codes() + kTokens * kGroupCols + i);
}

// out += x_scale * (sum over parts of minimum * sum of x + sum over parts of scale * sum), in this order.
template <typename Strips, bool kFetches, int kTokens>
__attribute__((noinline)) void int8_tile(const Group& group, const TileTokens& tokens) {
    constexpr int64_t kPartSteps = kGroupCols / 4 / Strips::kParts;
    constexpr bool kWhole = Strips::kParts == 1;
    static_assert(!kWhole || !Strips::kMinimums);
    alignas(64) int32_t of_rows[kTokens * kStripRows];
    alignas(64) float values[kTokens * kStripRows];
    fetch_next<kTokens>(tokens);
    if constexpr (Strips::kMinimums)
        add_minimums<Strips, kTokens>(group, tokens, values);
    else if constexpr (!kWhole)
        std::memset(values, 0, sizeof values);
    for (int64_t part = 0; part < Strips::kParts; ++part) {
        int32_t of_tokens[kTokens];
        const Starts starts = start_sums<Strips, kTokens>(group, tokens, part, of_tokens, of_rows);
        multiply_codes<kTokens, Strips::kZero, kPartSteps, kWhole, kFetches>(
            group.codes + part * kPartSteps * kStepCodes, tokens.codes() + part * kPartSteps * 4, starts,
            group.scales + part * kStripRows, tokens.scales(), kWhole ? tokens.out : values);
    }
    if constexpr (!kWhole)
        for (int64_t t = 0; t < kTokens; ++t)
            for (int64_t row = 0; row < kStripRows; row += kLanes) {
                float* place = tokens.out + t * kStripRows + row;
                store(place, fma(load(values + t * kStripRows + row), broadcast(tokens.scales()[t]), load(place)));
            }
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
