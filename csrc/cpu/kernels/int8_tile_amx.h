// The int8 tile by matrix units: sixteen tokens and all rows of a strip at once. Sums and their float32 order are those
// of int8_tile.h, so the results are the same bits.
#pragma once

#include "cpu/kernels/amx_tiles.h"
#include "cpu/kernels/int8_tile.h"

#if defined(__AMX_INT8__)

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kAmxTokens = 16;
// Fewer tokens than this are faster by vectors, which need not work for absent ones.
constexpr int64_t kFewestAmxTokens = 9;

// sums[token][row] of sixteen tokens and one part.
template <typename Strips>
inline void amx_multiply(const uint8_t* codes, const int8_t* x, int32_t* sums) {
    constexpr int64_t kPartCols = kGroupCols / Strips::kParts;
    constexpr int64_t kStepCols = kPartCols < 64 ? kPartCols : 64;
    constexpr int64_t kRowBytes = kStripRows * sizeof(int32_t);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    GEMMA2_FAST_UNROLL
    for (int64_t col = 0; col < kPartCols; col += kStepCols, codes += kStepCols * kStripRows) {
        _tile_loadd(4, x + col, kGroupCols);
        _tile_loadd(5, codes, kStepCodes);
        _tile_dpbsud(0, 4, 5);
        _tile_loadd(6, codes + 64, kStepCodes);
        _tile_dpbsud(1, 4, 6);
        _tile_loadd(7, codes + 128, kStepCodes);
        _tile_dpbsud(2, 4, 7);
        _tile_loadd(5, codes + 192, kStepCodes);
        _tile_dpbsud(3, 4, 5);
    }
    _tile_stored(0, sums, kRowBytes);
    _tile_stored(1, sums + 16, kRowBytes);
    _tile_stored(2, sums + 32, kRowBytes);
    _tile_stored(3, sums + 48, kRowBytes);
}

// Whole tiles of sixteen tokens are read, of which the last may have fewer. The float32 sums of a tile are done while
// the next one is multiplied: by then the stores of its int32 sums have settled.
template <typename Strips>
__attribute__((noinline)) void amx_tiles(const Group& group, const TileTokens& tokens, int64_t num_tokens) {
    constexpr int64_t kPartCols = kGroupCols / Strips::kParts;
    alignas(64) int32_t sums[2][kAmxTokens * kStripRows];
    const int64_t num_tiles = (num_tokens + kAmxTokens - 1) / kAmxTokens, num_products = num_tiles * Strips::kParts;
    for (int64_t i = 0; i <= num_products; ++i) {
        if (i < num_products) {
            const int64_t part = i % Strips::kParts, first = i / Strips::kParts * kAmxTokens;
            amx_multiply<Strips>(group.codes + part * kPartCols * kStripRows,
                                 tokens.codes + first * kGroupCols + part * kPartCols, sums[i % 2]);
        }
        if (i > 0) {
            const int64_t part = (i - 1) % Strips::kParts, first = (i - 1) / Strips::kParts * kAmxTokens;
            const int64_t count = num_tokens - first < kAmxTokens ? num_tokens - first : kAmxTokens;
            const TileTokens of_tile = after(tokens, first);
            add_part<Strips, true>(group, of_tile, count, part, sums[(i - 1) % 2]);
            if (Strips::kParts > 1 && part == Strips::kParts - 1) add_outliers<Strips>(group, of_tile, count);
        }
    }
}

}  // namespace
GEMMA2_FAST_END_ISA

#endif
