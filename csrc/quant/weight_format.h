#pragma once

#include <cstdint>
#include <string_view>

namespace gemma2_fast {

// How the elements of a weight matrix are stored. Names equal those of gemma2_fast.quant.FORMATS.
enum class WeightType { kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ4_K, kQ5_K, kQ6_K };

struct WeightFormat {
    WeightType type;
    std::string_view name;
    int64_t block_weights;  // consecutive weights of a row that share one block
    int64_t block_bytes;
};

const WeightFormat& weight_format(WeightType type);
const WeightFormat& weight_format(std::string_view name);  // throws Error that lists the known names

}  // namespace gemma2_fast
