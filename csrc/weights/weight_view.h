#pragma once

#include <cstddef>
#include <cstdint>

#include "quant/weight_format.h"

namespace gemma2_fast {

// A row-major [rows, cols] weight matrix that somebody else owns. Rows are whole blocks; data may be unaligned
// (it usually lies in a memory-mapped file).
struct WeightView {
    WeightType type = WeightType::kF32;
    int64_t rows = 0;
    int64_t cols = 0;
    const std::byte* data = nullptr;

    int64_t row_bytes() const {
        const WeightFormat& format = weight_format(type);
        return (cols + format.block_weights - 1) / format.block_weights * format.block_bytes;
    }
    const std::byte* row(int64_t index) const { return data + index * row_bytes(); }
};

}  // namespace gemma2_fast
