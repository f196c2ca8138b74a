// The same sums as integer_products.h by matrix units, for up to sixteen rows: a row's codes lie one after the other,
// first the high parts, then the low ones.
#pragma once

#include "cpu/kernels/amx_tiles.h"
#include "cpu/kernels/integer_products.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

inline int64_t matrix_dims(int64_t head_dim) { return (head_dim + 63) / 64 * 64; }

#if defined(__AMX_INT8__)

constexpr int64_t kMatrixRows = kAmxRows;

struct MatrixSums {
    int32_t high[kAmxRows][kRowElements];
    int32_t low[kAmxRows][kRowElements];

    Ints of(int64_t row, int64_t column) const {
        return add(shift_left_8({_mm512_load_si512(&high[row][column])}), {_mm512_load_si512(&low[row][column])});
    }
};

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

inline void store_sums(MatrixSums& sums) {
    _tile_stored(0, sums.high[0], sizeof sums.high[0]);
    _tile_stored(1, sums.high[0] + 16, sizeof sums.high[0]);
    _tile_stored(2, sums.low[0], sizeof sums.low[0]);
    _tile_stored(3, sums.low[0] + 16, sizeof sums.low[0]);
}

// As many codes and column bytes as the tiles are wide. Reads sixteen rows, whatever they hold.
template <Operand kOperand>
inline void add_matrix_products(const std::byte* codes, int64_t row_stride, int64_t part_stride,
                                const std::byte* columns) {
    _tile_loadd(4, codes, row_stride);
    _tile_loadd(6, columns, kStepColumnBytes);
    _tile_loadd(7, columns + 64, kStepColumnBytes);
    if constexpr (kOperand == Operand::kKeys) {
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_loadd(4, codes + part_stride, row_stride);
        _tile_dpbsud(2, 4, 6);
        _tile_dpbsud(3, 4, 7);
    } else {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        _tile_loadd(4, codes + part_stride, row_stride);
        _tile_dpbusd(2, 4, 6);
        _tile_dpbusd(3, 4, 7);
    }
}

// The lines of the step's bytes; gives the next step.
inline const std::byte* fetch_lines(Fetch fetched) {
    for (int64_t i = 0; i < fetched.step; i += 64) __builtin_prefetch(fetched.from + i, 0, 2);
    return fetched.from + fetched.step;
}

#else

constexpr int64_t kMatrixRows = 0;

#endif

}  // namespace
GEMMA2_FAST_END_ISA
