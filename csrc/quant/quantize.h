#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/cpu_features.h"
#include "base/thread_pool.h"
#include "quant/weight_format.h"

namespace gemma2_fast {

// Rows of a matrix stored as F32, F16 or BF16, one after another; somebody else owns them, and data may be unaligned.
struct UnquantizedRows {
    WeightType type = WeightType::kF32;
    int64_t rows = 0;
    int64_t cols = 0;
    const std::byte* data = nullptr;
};

// Writes the rows to `out` as strips of kInt8G128 or kInt4G32, bit for bit as gemma2_fast.quant packs them whatever the
// instruction set. Throws Error for other types. Returns the first row that holds an infinity or a NaN, if any: then
// `out` is worthless.
std::optional<int64_t> quantize_strips(const UnquantizedRows& source, WeightType target, std::byte* out,
                                       InstructionSet set, ThreadPool& pool);

}  // namespace gemma2_fast
