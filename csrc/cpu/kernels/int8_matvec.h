// The int8 matmul of one token. Its time is that of reading the weights, so strips are read side by side: a processor
// asks for more memory at once where it follows more than one stream, above all across small pages
// (docs/decisions/003). Nothing is unpacked to memory; the results are the bits of int8_tile.h.
#pragma once

#include "cpu/kernels/int8_tile.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kMatvecFetchBytes = 2048;  // how far ahead of the reads memory is asked
constexpr int kRowVectors = 4;               // of a strip, whose sums are held in registers

#if defined(__AVX512F__)
constexpr int64_t kMostMatvecStrips = 2;
#else
constexpr int64_t kMostMatvecStrips = 1;  // sixteen registers hold no more
#endif

inline void fetch_near(const void* p) { __builtin_prefetch(static_cast<const char*>(p) + kMatvecFetchBytes); }

// The activations of one group.
struct MatvecGroup {
    const int8_t* codes;       // [128]
    const Outliers* outliers;  // null where there are none
    const int32_t* part_sums;  // [8]
    int32_t sum;
    float scale;
};

template <int kStrips>
using Totals = Int32s[kStrips][kRowVectors];

// How a format's blocks are multiplied: row(pass, v) is the first row of vector v, and totals are exact sums of
// (scaled code) * x over the columns of a block.
struct MatvecInt8G128 {
    using Block = Int8G128Block;
    static constexpr int32_t kStart = kOffset<128> - 128;

    static int64_t row(int64_t pass, int v) { return (pass * kRowVectors + v) * kLanes; }

    template <int kStrips>
    static void multiply(const Block* const (&blocks)[kStrips], int64_t pass, const MatvecGroup& x,
                         Totals<kStrips>& totals) {
        const int32_t start = kStart * x.sum;
        for (auto& strip : totals)
            for (Int32s& total : strip) total = spread(&start);
        const int64_t offset = row(pass, 0) * 4;
        for (int64_t step = 0; step < kGroupCols / 4; ++step) {
            const Bytes columns = spread(x.codes + step * 4);
            GEMMA2_FAST_UNROLL
            for (int s = 0; s < kStrips; ++s) {
                const uint8_t* codes = &blocks[s]->codes[step][0][0] + offset;
                GEMMA2_FAST_UNROLL
                for (int v = 0; v < kRowVectors; ++v) {
                    fetch_near(codes + v * kLanes * 4);
                    totals[s][v] = add_products<128>(totals[s][v], load_bytes(codes + v * kLanes * 4), columns);
                }
            }
        }
    }

    // Products of what the code of an outlier leaves over.
    static void add_outlier(const Block& block, int64_t pass, const Outliers& outliers, int index,
                            Int32s (&sums)[kRowVectors]) {
        const uint8_t* codes = &block.codes[outliers.step[index]][0][0] + row(pass, 0) * 4;
        for (int v = 0; v < kRowVectors; ++v)
            sums[v] = add_products<128>(sums[v], load_bytes(codes + v * kLanes * 4), spread(outliers.upper[index]));
    }
};

struct MatvecInt4G32 {
    using Block = Int4G32Block;
    // Upper nibbles are multiplied where they are, as 16 times their value, where products of that size have room.
    static constexpr int kUpperShift = kRoomForWideCodes ? 4 : 0;

    // Vectors 2 i and 2 i + 1 are the lower and the upper nibbles of one vector of bytes.
    static int64_t byte_row(int64_t pass, int pair) { return (pass * kRowVectors / 2 + pair) * kLanes; }
    static int64_t row(int64_t pass, int v) {
        const int64_t place = byte_row(pass, v / 2);
        return place / 16 * 32 + v % 2 * 16 + place % 16;
    }

    static Bytes lower(Bytes nibbles) { return and_bytes(nibbles, 0x0f); }
    static Bytes upper(Bytes nibbles) {
        return kRoomForWideCodes ? and_bytes(nibbles, 0xf0) : and_bytes(shift_right_4(nibbles), 0x0f);
    }

    // What the sums of a part start from, so that they count nibbles from 8; digits: the sum of its activations.
    static void start(int32_t digits, Int32s (&sums)[kRowVectors]) {
        const int32_t of_lower = -8 * digits, of_upper = of_lower * (1 << kUpperShift);
        for (int v = 0; v < kRowVectors; ++v) sums[v] = spread(v % 2 == 0 ? &of_lower : &of_upper);
    }

    static void add_step(const uint8_t* nibbles, Bytes columns, Int32s (&sums)[kRowVectors]) {
        GEMMA2_FAST_UNROLL
        for (int v = 0; v < kRowVectors; v += 2, nibbles += kLanes * 4) {
            const Bytes both = load_bytes(nibbles);
            sums[v] = add_products<8>(sums[v], lower(both), columns);
            sums[v + 1] = add_products<8>(sums[v + 1], upper(both), columns);
        }
    }

    // totals += first * (a factor) + second * (the next one), the factors of parts 2 * pair and 2 * pair + 1.
    static void add_factored(const Block& block, int64_t pass, int64_t pair, const Int32s (&first)[kRowVectors],
                             const Int32s (&second)[kRowVectors], Int32s (&totals)[kRowVectors]) {
        GEMMA2_FAST_UNROLL
        for (int v = 0; v < kRowVectors; ++v) {
            const I32 packed = load_u8(reinterpret_cast<const std::byte*>(block.factors[pair] + row(pass, v)));
            const I32 apart = bit_and(bit_or(packed, shift_left(packed, 12)), 0x000f000f);
            const Int32s factors = pair_minus(apart.v, 8);
            const int shift = v % 2 == 0 ? 0 : kUpperShift;
            totals[v] = add_pair_products(totals[v], pair_of(first[v], second[v], shift), factors);
        }
    }

    template <int kStrips>
    static void multiply(const Block* const (&blocks)[kStrips], int64_t pass, const MatvecGroup& x,
                         Totals<kStrips>& totals) {
        const int64_t offset = byte_row(pass, 0) * 4;
        for (int64_t pair = 0; pair < 2; ++pair) {
            Totals<kStrips> sums[2];
            GEMMA2_FAST_UNROLL
            for (int64_t i = 0; i < 2; ++i) {
                const int64_t part = 2 * pair + i;
                for (auto& strip : sums[i]) start(x.part_sums[2 * part] + x.part_sums[2 * part + 1], strip);
                GEMMA2_FAST_UNROLL
                for (int64_t step = part * 8; step < part * 8 + 8; ++step) {
                    const Bytes columns = spread(x.codes + step * 4);
                    GEMMA2_FAST_UNROLL
                    for (int s = 0; s < kStrips; ++s) {
                        const uint8_t* nibbles = &blocks[s]->nibbles[step][0][0][0] + offset;
                        GEMMA2_FAST_UNROLL
                        for (int v = 0; v < kRowVectors; v += 2) fetch_near(nibbles + v / 2 * kLanes * 4);
                        add_step(nibbles, columns, sums[i][s]);
                    }
                }
            }
            GEMMA2_FAST_UNROLL
            for (int s = 0; s < kStrips; ++s) add_factored(*blocks[s], pass, pair, sums[0][s], sums[1][s], totals[s]);
        }
    }

    static void add_outlier(const Block& block, int64_t pass, const Outliers& outliers, int index,
                            Int32s (&sums)[kRowVectors]) {
        const int64_t step = outliers.step[index], part = step / 8;
        Int32s products[kRowVectors], none[kRowVectors] = {};
        start(outliers.digit[index], products);
        add_step(&block.nibbles[step][0][0][0] + byte_row(pass, 0) * 4, spread(outliers.upper[index]), products);
        if (part % 2 == 0)
            add_factored(block, pass, part / 2, products, none, sums);
        else
            add_factored(block, pass, part / 2, none, products, sums);
    }
};

// out[64 s + row] of kStrips strips that lie strip_bytes apart.
template <typename Matvec, int kStrips>
__attribute__((noinline)) void multiply_token(const std::byte* strips, int64_t strip_bytes, int64_t num_groups,
                                              const QuantizedRows& x, float* out) {
    using Block = typename Matvec::Block;
    for (int64_t pass = 0; pass < kStripRows / (kRowVectors * kLanes); ++pass) {
        F32 results[kStrips][kRowVectors];
        for (auto& strip : results)
            for (F32& result : strip) result = broadcast(0);
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t place = group * x.token_stride;
            const MatvecGroup of_x{.codes = x.codes + place * kGroupCols,
                                   .outliers = x.has_outliers[place] != 0 ? x.outliers + place : nullptr,
                                   .part_sums = x.part_sums + place * kMaxParts,
                                   .sum = x.sums[place],
                                   .scale = x.scales[place]};
            const Block* blocks[kStrips];
            for (int s = 0; s < kStrips; ++s)
                blocks[s] = reinterpret_cast<const Block*>(strips + s * strip_bytes) + group;
            Totals<kStrips> totals{};
            Matvec::template multiply<kStrips>(blocks, pass, of_x, totals);
            for (int s = 0; of_x.outliers != nullptr && s < kStrips; ++s) {
                Int32s sums[kRowVectors] = {};
                Matvec::add_outlier(*blocks[s], pass, *of_x.outliers, 0, sums);
                Matvec::add_outlier(*blocks[s], pass, *of_x.outliers, 1, sums);
                for (int v = 0; v < kRowVectors; ++v)
                    totals[s][v] = add(I32{totals[s][v]}, shift_left(I32{sums[v]}, 7)).v;
            }
            GEMMA2_FAST_UNROLL
            for (int s = 0; s < kStrips; ++s) {
                GEMMA2_FAST_UNROLL
                for (int v = 0; v < kRowVectors; ++v) {
                    const F32 scale = load_bf16(blocks[s]->scales + Matvec::row(pass, v));
                    const F32 value = mul(to_float(I32{totals[s][v]}), scale);
                    results[s][v] = fma(value, broadcast(of_x.scale), results[s][v]);
                }
            }
        }
        for (int s = 0; s < kStrips; ++s)
            for (int v = 0; v < kRowVectors; ++v) store(out + s * kStripRows + Matvec::row(pass, v), results[s][v]);
    }
}

}  // namespace
GEMMA2_FAST_END_ISA
