#include "quant/weight_format.h"

#include <array>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr std::array<WeightFormat, 13> kFormats{{
    {WeightType::kF32, "F32", 1, 1, 4},
    {WeightType::kF16, "F16", 1, 1, 2},
    {WeightType::kBF16, "BF16", 1, 1, 2},
    {WeightType::kQ8_0, "Q8_0", 1, 32, 34},
    {WeightType::kQ4_0, "Q4_0", 1, 32, 18},
    {WeightType::kQ4_1, "Q4_1", 1, 32, 20},
    {WeightType::kQ5_0, "Q5_0", 1, 32, 22},
    {WeightType::kQ5_1, "Q5_1", 1, 32, 24},
    {WeightType::kQ4_K, "Q4_K", 1, 256, 144},
    {WeightType::kQ5_K, "Q5_K", 1, 256, 176},
    {WeightType::kQ6_K, "Q6_K", 1, 256, 210},
    {WeightType::kInt8G128, "INT8_G128", kStripRows, 128, sizeof(Int8G128Block)},
    {WeightType::kInt4G32, "INT4_G32", kStripRows, 128, sizeof(Int4G32Block)},
}};

constexpr bool table_follows_enum() {
    for (std::size_t i = 0; i < kFormats.size(); ++i)
        if (static_cast<std::size_t>(kFormats[i].type) != i) return false;
    return true;
}
static_assert(table_follows_enum());

}  // namespace

const WeightFormat& weight_format(WeightType type) { return kFormats[static_cast<std::size_t>(type)]; }

const WeightFormat& weight_format(std::string_view name) {
    std::string known;
    for (const WeightFormat& format : kFormats) {
        if (format.name == name) return format;
        known += (known.empty() ? "" : ", ") + std::string(format.name);
    }
    throw Error("unknown weight format '" + std::string(name) + "': expected one of " + known);
}

}  // namespace gemma2_fast
