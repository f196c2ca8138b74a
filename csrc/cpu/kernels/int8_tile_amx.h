// The int8 tile by matrix units: 32 tokens and 32 rows of a strip at once. Sums and their float32 order are those of
// int8_tile.h, so the results are the same bits.
#pragma once

#include "cpu/kernels/amx_tiles.h"
#include "cpu/kernels/int8_tile.h"

#if defined(__AMX_INT8__)

GEMMA2_FAST_BEGIN_ISA
namespace {

// What four tiles of sums hold.
constexpr int64_t kUnitTokens = 2 * kAmxRows, kUnitRows = 2 * kAmxRows;
// Fewer tokens than this are faster by vectors, which need not work for absent ones.
constexpr int64_t kFewestAmxTokens = kMostUnpaddedTokens + 1;

// The products of one part of some groups, in the order in which they are computed.
struct Unit {
    int64_t group = 0, first_token = 0, first_row = 0, part = 0;

    template <typename Strips>
    void advance(int64_t num_tokens) {
        if (++part < Strips::kParts) return;
        part = 0;
        if ((first_row += kUnitRows) < kStripRows) return;
        first_row = 0;
        if ((first_token += kUnitTokens) < num_tokens) return;
        first_token = 0;
        ++group;
    }
};

template <typename Strips>
inline constexpr int64_t kStepCols = kGroupCols / Strips::kParts < 64 ? kGroupCols / Strips::kParts : 64;
template <typename Strips>
inline constexpr int64_t kUnitSteps = kGroupCols / Strips::kParts / kStepCols<Strips>;

// Tiles 0 to 3 = codes * x. Calls between(i) after the i-th product of 4 * kUnitSteps: vectors work while tiles
// multiply only if their instructions are this close.
template <typename Strips, typename Between>
inline __attribute__((always_inline)) void multiply_unit(const uint8_t* codes, const int8_t* x, Between between) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    GEMMA2_FAST_UNROLL
    for (int64_t step = 0; step < kUnitSteps<Strips>; ++step) {
        _tile_loadd(4, x, kGroupCols);
        _tile_loadd(6, codes, kStepCodes);
        _tile_dpbsud(0, 4, 6);
        between(4 * step);
        _tile_loadd(7, codes + 64, kStepCodes);
        _tile_dpbsud(1, 4, 7);
        between(4 * step + 1);
        _tile_loadd(5, x + kAmxRows * kGroupCols, kGroupCols);
        _tile_dpbsud(2, 5, 6);
        between(4 * step + 2);
        _tile_dpbsud(3, 5, 7);
        between(4 * step + 3);
        codes += kStepCols<Strips> * kStripRows;
        x += kStepCols<Strips>;
    }
}

inline void store_unit(int32_t* sums) {
    constexpr int64_t kRowBytes = kUnitRows * sizeof(int32_t);
    _tile_stored(0, sums, kRowBytes);
    _tile_stored(1, sums + kAmxRows, kRowBytes);
    _tile_stored(2, sums + kAmxRows * kUnitRows, kRowBytes);
    _tile_stored(3, sums + kAmxRows * kUnitRows + kAmxRows, kRowBytes);
}

// What the float32 sums of a unit need for each of its tokens.
template <typename Strips>
struct UnitTokens {
    alignas(64) int32_t start[kUnitTokens];  // makes the sums count codes from the code of zero
    alignas(64) float x_sum[kUnitTokens];    // of the part's columns

    void set(const TileTokens& tokens, int64_t part) {
        GEMMA2_FAST_UNROLL
        for (int64_t t = 0; t < kUnitTokens; ++t) {
            const int32_t sum = code_sum<Strips::kParts>(tokens, t, part);
            start[t] = -Strips::kZero * sum;
            if constexpr (Strips::kMinimums) x_sum[t] = tokens.scales[t] * static_cast<float>(sum);
        }
    }
};

// Adds the sums of some of a unit's tokens to their rows, as add_part does.
template <typename Strips, int64_t kTokens>
inline __attribute__((always_inline)) void add_slice(const UnitTokens<Strips>& unit, int64_t first,
                                                     const float* x_scales, const __m512 (&scales)[2],
                                                     const __m512 (&minimums)[2], __mmask16 summed, const int32_t* sums,
                                                     float* out) {
    GEMMA2_FAST_UNROLL
    for (int64_t t = first; t < first + kTokens; ++t) {
        const __m512 x_scale = _mm512_set1_ps(x_scales[t]);
        const __m512i start = _mm512_set1_epi32(unit.start[t]);
        GEMMA2_FAST_UNROLL
        for (int64_t v = 0; v < 2; ++v) {
            const __m512i of_rows = _mm512_add_epi32(_mm512_load_si512(sums + t * kUnitRows + v * kAmxRows), start);
            float* place = out + t * kStripRows + v * kAmxRows;
            __m512 total = _mm512_maskz_loadu_ps(summed, place);
            total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(of_rows), _mm512_mul_ps(scales[v], x_scale), total);
            if constexpr (Strips::kMinimums) total = _mm512_fmadd_ps(minimums[v], _mm512_set1_ps(unit.x_sum[t]), total);
            _mm512_storeu_ps(place, total);
        }
    }
    asm volatile("" : : : "memory");  // keeps the slice where it is
}

// Multiplies tokens and consecutive groups; tokens_of(g) are those of groups[g]. Whole units are computed, of which the
// last may have absent tokens. While tiles multiply, vectors add up the sums of the unit before the last: by then its
// stores have settled.
template <typename Strips, typename TokensOf>
__attribute__((noinline)) void multiply_groups_by_tiles(const Group* groups, int64_t num_groups, int64_t num_tokens,
                                                        TokensOf tokens_of, Fetch fetch) {
    constexpr int64_t kSlices = 4 * kUnitSteps<Strips>, kSliceTokens = kUnitTokens / kSlices;
    constexpr int64_t kPartCols = kGroupCols / Strips::kParts;
    alignas(64) int32_t sums[2][kUnitTokens * kUnitRows];
    UnitTokens<Strips> unit_tokens;
    const int64_t token_units = (num_tokens + kUnitTokens - 1) / kUnitTokens;
    const int64_t num_units = num_groups * token_units * (kStripRows / kUnitRows) * Strips::kParts;
    fetch.split(num_units);
    Unit multiplied, added;
    for (int64_t i = 0; i < num_units + 2; ++i) {
        int32_t* unit_sums = sums[i % 2];
        fetch.next();
        const auto multiply = [&](auto between) __attribute__((always_inline)) {
            multiply_unit<Strips>(
                groups[multiplied.group].codes + multiplied.part * kPartCols * kStripRows + multiplied.first_row * 4,
                tokens_of(multiplied.group).codes + multiplied.first_token * kGroupCols + multiplied.part * kPartCols,
                between);
            store_unit(unit_sums);
            multiplied.advance<Strips>(num_tokens);
        };
        if (i < 2) {
            if (i < num_units) multiply([](int64_t) {});
            continue;
        }
        const Group group = after_rows(groups[added.group], added.first_row);
        TileTokens tokens = after(tokens_of(added.group), added.first_token);
        tokens.out += added.first_row;
        const int64_t count =
            num_tokens - added.first_token < kUnitTokens ? num_tokens - added.first_token : kUnitTokens;
        if constexpr (Strips::kParts == 1) add_outliers_to_sums<Strips, kUnitRows>(group, tokens, count, unit_sums);
        unit_tokens.set(tokens, added.part);
        const int64_t place = added.part * kStripRows;
        const __m512 scales[2] = {_mm512_loadu_ps(group.scales + place),
                                  _mm512_loadu_ps(group.scales + place + kAmxRows)};
        __m512 minimums[2] = {};
        if constexpr (Strips::kMinimums) {
            minimums[0] = _mm512_loadu_ps(group.minimums + place);
            minimums[1] = _mm512_loadu_ps(group.minimums + place + kAmxRows);
        }
        const __mmask16 summed = tokens.first && added.part == 0 ? 0 : 0xffff;
        const auto between = [&](int64_t slice) __attribute__((always_inline)) {
            add_slice<Strips, kSliceTokens>(unit_tokens, slice * kSliceTokens, tokens.scales, scales, minimums, summed,
                                            unit_sums, tokens.out);
        };
        if (i < num_units) {
            multiply(between);
        } else {
            for (int64_t slice = 0; slice < kSlices; ++slice) between(slice);
        }
        if (Strips::kParts > 1 && added.part == Strips::kParts - 1)
            add_outliers<Strips, kUnitRows>(group, tokens, count);
        added.advance<Strips>(num_tokens);
    }
}

}  // namespace
GEMMA2_FAST_END_ISA

#endif
