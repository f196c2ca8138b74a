#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/weight_format.h"

namespace gemma2_fast {

// A [rows, cols] weight matrix that somebody else owns: row-major, or in strips where the format has them. Rows and
// strips are whole blocks; data may be unaligned (it usually lies in a memory-mapped file).
struct WeightView {
    WeightType type = WeightType::kF32;
    int64_t rows = 0;
    int64_t cols = 0;
    const std::byte* data = nullptr;

    // Bytes of a row, or of a strip where the format has them.
    int64_t row_bytes() const {
        const WeightFormat& format = weight_format(type);
        return (cols + format.block_weights - 1) / format.block_weights * format.block_bytes;
    }
    int64_t num_bytes() const {
        const int64_t block_rows = weight_format(type).block_rows;
        return (rows + block_rows - 1) / block_rows * row_bytes();
    }
    const std::byte* row(int64_t index) const { return data + index * row_bytes(); }
};

}  // namespace gemma2_fast
