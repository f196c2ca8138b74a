// The int8 tile by matrix units, for five tokens and more. Sums and their float32 order are those of int8_tile.h, so
// the results are the same bits.
#pragma once

#include "cpu/kernels/amx_tiles.h"
#include "cpu/kernels/int8_tile.h"

#if defined(__AMX_INT8__)

GEMMA2_FAST_BEGIN_ISA
namespace {

// Activations of a unit stay in tiles while all rows of the strip pass, sixteen at a time; those of eight parts have no
// room and are loaded again.
template <typename Strips>
inline constexpr int64_t kUnitTokens = Strips::kParts == 1 ? 2 * kAmxRows : kAmxRows;
// int32 sums of sixteen rows: [parts][tokens][16].
template <typename Strips>
inline constexpr int64_t kUnitSums = Strips::kParts * kUnitTokens<Strips> * kAmxRows;
template <typename Strips>
inline constexpr int64_t kUnitProducts = Strips::kParts == 8 ? 8 : 4;

// How far ahead of the reads weights are brought from the second-level cache to the first: a group and its scales.
constexpr int64_t kNearFetchBytes = sizeof(Int8G128Block);

// Tiles hold two sums, four activations and two weights.
constexpr int kSumTiles = 2;

// One unit of tokens in one group.
struct Unit {
    Group group;
    TileTokens tokens;
    uint32_t outliers;    // a bit for each token that has some
    const float* x_sums;  // [parts][tokens], where weights have minimums
};

// Asks for a slice of what the next unit loads: its tiles would wait for it.
template <typename Strips>
inline __attribute__((always_inline)) void fetch_slice(const int8_t* x, int64_t slice) {
    constexpr int64_t kBytes = kUnitTokens<Strips> * kGroupCols / (4 * kUnitProducts<Strips>);
    GEMMA2_FAST_UNROLL
    for (int64_t i = 0; i < kBytes; i += 64) __builtin_prefetch(x + slice * kBytes + i);
}

inline void load_activations(const int8_t* x, int64_t row_bytes, int64_t col_bytes) {
    _tile_loadd(2, x, kGroupCols);
    _tile_loadd(3, x + col_bytes, kGroupCols);
    _tile_loadd(4, x + row_bytes, kGroupCols);
    _tile_loadd(5, x + row_bytes + col_bytes, kGroupCols);
}

// sums = products with sixteen rows' codes. Calls between(i) after the i-th product: vectors work while tiles multiply
// only if their instructions are this close.
template <typename Strips, typename Between>
inline __attribute__((always_inline)) void multiply_rows(const uint8_t* codes, const int8_t* x, int32_t* sums,
                                                         Between between) {
    constexpr int64_t kTile = kAmxRows * kAmxRows, kRowBytes = kAmxRows * sizeof(int32_t);
    if constexpr (Strips::kParts == 1) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(6, codes, kStepCodes);
        _tile_dpbssd(0, 2, 6);
        between(0);
        _tile_dpbssd(1, 4, 6);
        between(1);
        _tile_loadd(7, codes + kGroupCodes / 2, kStepCodes);
        _tile_dpbssd(0, 3, 7);
        between(2);
        _tile_dpbssd(1, 5, 7);
        between(3);
        _tile_stored(0, sums, kRowBytes);
        _tile_stored(1, sums + kTile, kRowBytes);
    } else {
        constexpr int64_t kPartCols = kGroupCols / Strips::kParts;
        constexpr int64_t kPartCodes = kGroupCodes / Strips::kParts;
        GEMMA2_FAST_UNROLL
        for (int64_t part = 0; part < Strips::kParts; part += 4) {
            if constexpr (Strips::kParts > 4) load_activations(x + part * kPartCols, 2 * kPartCols, kPartCols);
            _tile_loadd(6, codes + part * kPartCodes, kStepCodes);
            _tile_zero(0);
            _tile_dpbssd(0, 2, 6);
            _tile_stored(0, sums + part * kTile, kRowBytes);
            between(part);
            _tile_loadd(7, codes + (part + 1) * kPartCodes, kStepCodes);
            _tile_zero(1);
            _tile_dpbssd(1, 3, 7);
            _tile_stored(1, sums + (part + 1) * kTile, kRowBytes);
            between(part + 1);
            _tile_loadd(6, codes + (part + 2) * kPartCodes, kStepCodes);
            _tile_zero(0);
            _tile_dpbssd(0, 4, 6);
            _tile_stored(0, sums + (part + 2) * kTile, kRowBytes);
            between(part + 2);
            _tile_loadd(7, codes + (part + 3) * kPartCodes, kStepCodes);
            _tile_zero(1);
            _tile_dpbssd(1, 5, 7);
            _tile_stored(1, sums + (part + 3) * kTile, kRowBytes);
            between(part + 3);
        }
    }
}

// Which of the first `count` tokens of a unit have outliers.
template <int64_t kTokens>
inline uint32_t outlier_bits(const uint8_t* has_outliers, int64_t count) {
    uint32_t bits = 0;
    for (int64_t t = 0; t < kTokens; t += 16) {
        const __m128i flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(has_outliers + t));
        bits |= static_cast<uint32_t>(_mm_movemask_epi8(_mm_slli_epi16(flags, 7))) << t;
    }
    return count < kTokens ? bits & ((uint32_t{1} << count) - 1) : bits;
}

// As add_outliers of int8_tile.h, for sixteen rows and codes that count from zero.
template <typename Strips>
inline void add_outliers_to_rows(const Unit& unit, int64_t row, int32_t* sums) {
    for (uint32_t left = unit.outliers; left != 0; left &= left - 1) {
        const int64_t t = __builtin_ctz(left);
        const Outliers& outliers = unit.tokens.outliers()[t];
        for (int i = 0; i < 2; ++i) {
            // One operand is unsigned: codes are moved up by 128, and their products down.
            const uint8_t* codes = unit.group.codes + outliers.step[i] * kStepCodes + row * 4;
            const __m512i moved = _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(-128));
            const __m512i products =
                add_products<128>(_mm512_set1_epi32(-128 * outliers.digit[i]), moved, spread(outliers.upper[i]));
            const int64_t part = outliers.step[i] / (kGroupCols / 4 / Strips::kParts);
            int32_t* sum = sums + (part * kUnitTokens<Strips> + t) * kAmxRows;
            _mm512_store_si512(sum, _mm512_add_epi32(_mm512_load_si512(sum), _mm512_slli_epi32(products, 7)));
        }
    }
}

// The sums of activations, which meet minimums.
template <typename Strips>
inline void sum_activations(const TileTokens& tokens, float* x_sums) {
    for (int64_t t = 0; t < kUnitTokens<Strips>; ++t)
        for (int64_t part = 0; part < Strips::kParts; ++part)
            x_sums[part * kUnitTokens<Strips> + t] = static_cast<float>(code_sum<Strips::kParts>(tokens, t, part));
}

// Adds the products of a unit with sixteen rows to the totals, while multiply(between) computes others.
template <typename Strips, typename Multiply>
inline __attribute__((always_inline)) void add_rows(const Unit& unit, int64_t row, int32_t* sums, Multiply multiply) {
    constexpr int64_t kTokens = kUnitTokens<Strips>, kSliceTokens = kTokens / kUnitProducts<Strips>;
    if (unit.outliers != 0) [[unlikely]]
        add_outliers_to_rows<Strips>(unit, row, sums);
    __m512 scales[Strips::kParts], minimums[Strips::kParts];
    GEMMA2_FAST_UNROLL
    for (int64_t part = 0; part < Strips::kParts; ++part) {
        scales[part] = _mm512_loadu_ps(unit.group.scales + part * kStripRows + row);
        if constexpr (Strips::kMinimums)
            minimums[part] = _mm512_loadu_ps(unit.group.minimums + part * kStripRows + row);
    }
    const float* x_scales = unit.tokens.scales();
    float* out = unit.tokens.out + row;
    multiply([&](int64_t slice) __attribute__((always_inline)) {
        GEMMA2_FAST_UNROLL
        for (int64_t i = 0; i < kSliceTokens; ++i) {
            const int64_t t = slice * kSliceTokens + i;
            __m512 value = _mm512_setzero_ps();
            if constexpr (Strips::kMinimums) {
                GEMMA2_FAST_UNROLL
                for (int64_t part = 0; part < Strips::kParts; ++part) {
                    const __m512 x_sum = _mm512_set1_ps(unit.x_sums[part * kTokens + t]);
                    value =
                        part == 0 ? _mm512_mul_ps(minimums[0], x_sum) : _mm512_fmadd_ps(minimums[part], x_sum, value);
                }
            }
            GEMMA2_FAST_UNROLL
            for (int64_t part = 0; part < Strips::kParts; ++part) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + (part * kTokens + t) * kAmxRows));
                value = part == 0 && !Strips::kMinimums ? _mm512_mul_ps(sum, scales[0])
                                                        : _mm512_fmadd_ps(sum, scales[part], value);
            }
            float* total = out + t * kStripRows;
            _mm512_storeu_ps(total, _mm512_fmadd_ps(value, _mm512_set1_ps(x_scales[t]), _mm512_loadu_ps(total)));
        }
        asm volatile("" : : : "memory");  // keeps the slice where it is
    });
}

// Multiplies tokens and consecutive groups, whose codes count from zero. Whole units are computed, of which the last
// may have absent tokens. While tiles multiply sixteen rows, vectors add up the sixteen before.
template <typename Strips>
__attribute__((noinline)) void multiply_groups_by_tiles(const Group* groups, int64_t num_groups,
                                                        const TileTokens& block, int64_t num_tokens, Fetch fetch) {
    constexpr int64_t kTokens = kUnitTokens<Strips>, kPartCols = kGroupCols / Strips::kParts;
    alignas(64) int32_t sums[2][kUnitSums<Strips>];
    alignas(64) float x_sums[2][Strips::kParts * kTokens];
    const int64_t num_units = (num_tokens + kTokens - 1) / kTokens;
    fetch.split(num_groups * num_units);
    Unit unit{}, last;
    TileTokens next = block;
    int64_t group = 0, first_token = 0;
    for (int64_t i = 0; i < num_groups * num_units; ++i) {
        const TileTokens tokens = next;
        last = unit;
        unit = {groups[group], tokens, outlier_bits<kTokens>(tokens.has_outliers(), num_tokens - first_token),
                x_sums[i % 2]};
        if (first_token += kTokens; first_token >= num_tokens) {
            first_token = 0;
            ++group;
        }
        next = block.of_later_group(group).after(first_token);
        const int8_t* next_codes = next.codes();
        if constexpr (Strips::kMinimums) sum_activations<Strips>(tokens, x_sums[i % 2]);
        fetch.next();
        if constexpr (Strips::kParts == 1)
            load_activations(tokens.codes(), kAmxRows * kGroupCols, kGroupCols / 2);
        else if constexpr (Strips::kParts == 4)
            load_activations(tokens.codes(), 2 * kPartCols, kPartCols);
        const auto multiply = [&](int64_t row) __attribute__((always_inline)) {
            return [&, row](auto between) __attribute__((always_inline)) {
                const auto fetch_and = [&](int64_t slice) __attribute__((always_inline)) {
                    fetch_slice<Strips>(next_codes, row / kAmxRows * kUnitProducts<Strips> + slice);
                    between(slice);
                };
                multiply_rows<Strips>(unit.group.codes + row * 4, tokens.codes(), sums[row / kAmxRows % 2], fetch_and);
            };
        };
        if (i == 0)
            multiply(0)([](int64_t) {});
        else
            add_rows<Strips>(last, 3 * kAmxRows, sums[1], multiply(0));
        add_rows<Strips>(unit, 0, sums[0], multiply(kAmxRows));
        add_rows<Strips>(unit, kAmxRows, sums[1], multiply(2 * kAmxRows));
        add_rows<Strips>(unit, 2 * kAmxRows, sums[0], multiply(3 * kAmxRows));
    }
    add_rows<Strips>(unit, 3 * kAmxRows, sums[1], [](auto between) __attribute__((always_inline)) {
        GEMMA2_FAST_UNROLL
        for (int64_t slice = 0; slice < kUnitProducts<Strips>; ++slice) between(slice);
    });
}

// Up to sixteen tokens and one group, whose codes stay where they are and as they are. Memory is waited for: after each
// product, an eighth of the weights of a later group is asked for, and brought near from where an earlier call put it.
template <typename Strips, bool kFetches>
__attribute__((noinline)) void multiply_few_by_tiles(const Group& group, const TileTokens& tokens, int64_t num_tokens) {
    static_assert(Strips::kParts == 1 && !Strips::kMinimums);
    constexpr int64_t kRowBytes = kStripRows * sizeof(int32_t);
    alignas(64) int32_t sums[kAmxRows * kStripRows];
    _tile_loadd(2, tokens.codes(), kGroupCols);
    _tile_loadd(3, tokens.codes() + kGroupCols / 2, kGroupCols);
    static_assert(kStripRows / (2 * kAmxRows) * 4 == 8, "products, and so requests");
    const uint8_t* fetched = group.codes;
    const auto fetch_lines = [&] {
        if constexpr (kFetches) {
            GEMMA2_FAST_UNROLL
            for (int64_t i = 0; i < kGroupCodes / 8; i += 64) {
                fetch_ahead(fetched + i);
                __builtin_prefetch(fetched + i + kNearFetchBytes);
            }
            fetched += kGroupCodes / 8;
        }
    };
    GEMMA2_FAST_UNROLL
    for (int64_t row = 0; row < kStripRows; row += 2 * kAmxRows) {
        const uint8_t* codes = group.codes + row * 4;
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(6, codes, kStepCodes);
        _tile_dpbsud(0, 2, 6);
        fetch_lines();
        _tile_loadd(7, codes + kAmxRows * 4, kStepCodes);
        _tile_dpbsud(1, 2, 7);
        fetch_lines();
        _tile_loadd(6, codes + kGroupCodes / 2, kStepCodes);
        _tile_dpbsud(0, 3, 6);
        fetch_lines();
        _tile_loadd(7, codes + kGroupCodes / 2 + kAmxRows * 4, kStepCodes);
        _tile_dpbsud(1, 3, 7);
        fetch_lines();
        _tile_stored(0, sums + row, kRowBytes);
        _tile_stored(1, sums + row + kAmxRows, kRowBytes);
    }
    for_outliers(tokens, num_tokens,
                 [&](int64_t t) { add_outliers<Strips>(group.codes, tokens.outliers()[t], 0, sums + t * kStripRows); });
    __m512 scales[4];
    for (int64_t v = 0; v < 4; ++v) scales[v] = _mm512_loadu_ps(group.scales + v * kAmxRows);
    for (int64_t t = 0; t < num_tokens; ++t) {
        const __m512i start = _mm512_set1_epi32(-Strips::kZero * tokens.sums()[t]);
        const __m512 x_scale = _mm512_set1_ps(tokens.scales()[t]);
        GEMMA2_FAST_UNROLL
        for (int64_t v = 0; v < 4; ++v) {
            const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums + t * kStripRows + v * kAmxRows), start);
            float* total = tokens.out + t * kStripRows + v * kAmxRows;
            const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), scales[v]);
            _mm512_storeu_ps(total, _mm512_fmadd_ps(value, x_scale, _mm512_loadu_ps(total)));
        }
    }
}

// A group whose codes count from zero, which makes them signed; in `buffer`, where the group may already be.
template <typename Strips>
inline Group centred(const Group& group, GroupBuffer& buffer) {
    if constexpr (Strips::kZero == 0) return group;
    const __m512i zero = _mm512_set1_epi8(static_cast<char>(Strips::kZero));
    for (int64_t i = 0; i < kGroupCodes; i += 64) {
        if constexpr (Strips::kInPlace) fetch_ahead(group.codes + i);
        _mm512_store_si512(buffer.codes + i, _mm512_sub_epi8(_mm512_loadu_si512(group.codes + i), zero));
    }
    return {buffer.codes, group.scales, group.minimums};
}

}  // namespace
GEMMA2_FAST_END_ISA

#endif
