// The matrix tiles of the processor, shaped for products of bytes.
#pragma once

#include "cpu/simd.h"

#if defined(__AMX_INT8__)

GEMMA2_FAST_BEGIN_ISA
namespace {

constexpr int64_t kAmxRows = 16;

// While one lives, this thread's first num_sums tiles hold sums, 6 and 7 weights, those between activations: of up to
// sixteen tokens, and steps of part_cols columns, 64 at most.
class AmxTiles {
  public:
    explicit AmxTiles(int64_t part_cols, int num_sums = 4, int64_t num_tokens = kAmxRows) {
        struct {
            uint8_t palette = 1, start_row = 0;
            uint8_t reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        static_assert(sizeof config == 64);
        const int64_t step_cols = part_cols < 64 ? part_cols : 64;
        for (int tile = 0; tile < 8; ++tile) {
            config.row_bytes[tile] = static_cast<uint16_t>(tile >= num_sums && tile < 6 ? step_cols : 64);
            config.rows[tile] = static_cast<uint8_t>(tile > 5 ? step_cols / 4 : num_tokens);
        }
        // GCC takes the intrinsic to read eight bytes, and would leave out the stores of the others.
        asm volatile("" : : "m"(config));
        _tile_loadconfig(&config);
    }
    ~AmxTiles() { _tile_release(); }
};

}  // namespace
GEMMA2_FAST_END_ISA

#endif
