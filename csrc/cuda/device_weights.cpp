#include "cuda/device_weights.h"

#include "base/errors.h"
#include "cuda/launch_sizes.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kScaleCols = 128;  // columns that share a scale
constexpr int64_t kCodeBytes = 64;   // of their codes of four bits
constexpr int64_t kFactorBytes = 2;  // of their four factors
constexpr int64_t kMultiple = 16;    // what kernels were promised of rows and columns

struct RowBytes {
    int64_t weight, scales, factors;
};

RowBytes row_bytes(DeviceFormat format, int64_t cols) {
    const int64_t groups = divide_up(cols, kScaleCols);
    switch (format) {
        case DeviceFormat::kBF16:
            return {kBF16Bytes * cols, 0, 0};
        case DeviceFormat::kInt8:
            return {cols, kBF16Bytes * groups, 0};
        case DeviceFormat::kInt4:
            return {kCodeBytes * groups, kBF16Bytes * groups, kFactorBytes * groups};
    }
    throw Error("a weight format that the device does not know");
}

}  // namespace

DeviceWeights::DeviceWeights(std::map<std::string, DeviceFormat> formats, Arena& arena)
    : formats_(std::move(formats)), arena_(arena) {}

DeviceMatrix DeviceWeights::matrix(const std::vector<Part>& parts, int64_t cols, bool biased) {
    const std::string& first = parts.front().name;
    DeviceMatrix matrix{.format = format_of(first), .cols = cols};
    for (const Part& part : parts) {
        if (format_of(part.name) != matrix.format)
            throw BackendError("weights: " + part.name + " and " + first +
                               " must have one format, because a GPU kernel reads them as one matrix");
        matrix.rows += part.rows;
    }
    if (matrix.rows % kMultiple != 0 || cols % kMultiple != 0)
        throw BackendError("weights: " + first + " is of " + std::to_string(matrix.rows) + " rows and " +
                           std::to_string(cols) + " columns, GPU kernels need multiples of " +
                           std::to_string(kMultiple));
    const RowBytes bytes = row_bytes(matrix.format, cols);
    matrix.weight = arena_.reserve(matrix.rows * bytes.weight);
    matrix.scales = arena_.reserve(matrix.rows * bytes.scales);
    matrix.factors = arena_.reserve(matrix.rows * bytes.factors);
    if (biased) matrix.bias = arena_.reserve(matrix.rows * kF32Bytes);
    int64_t row = 0;
    for (const Part& part : parts) {
        const auto add = [&](const std::string& name, const char* part_name, const Arena::Slice& whole,
                             int64_t bytes_a_row) {
            if (bytes_a_row > 0) places_[name][part_name] = {whole.offset + row * bytes_a_row, part.rows * bytes_a_row};
        };
        add(part.name, "weight", matrix.weight, bytes.weight);
        add(part.name, "scales", matrix.scales, bytes.scales);
        add(part.name, "factors", matrix.factors, bytes.factors);
        if (biased) {
            add(part.name + "_bias", "weight", *matrix.bias, kF32Bytes);
            vectors_.insert(part.name + "_bias");
        }
        row += part.rows;
    }
    return matrix;
}

Arena::Slice DeviceWeights::vector(const std::string& name, int64_t size) {
    vectors_.insert(name);
    return places_[name]["weight"] = arena_.reserve(size * kF32Bytes);
}

Arena::Slice DeviceWeights::rows(const std::string& name, int64_t num_weights) {
    if (format_of(name) != DeviceFormat::kBF16) throw BackendError("weights: " + name + " must not be quantised");
    return places_[name]["weight"] = arena_.reserve(num_weights * kBF16Bytes);
}

Arena::Slice DeviceWeights::place(const std::string& name, const std::string& part) const {
    const auto tensor = places_.find(name);
    if (tensor == places_.end()) throw Error("weights: the model has no tensor " + name);
    const auto slice = tensor->second.find(part);
    if (slice == tensor->second.end()) throw Error("weights: " + name + " has no " + part + " in its format");
    return slice->second;
}

std::vector<std::pair<std::string, std::string>> DeviceWeights::parts() const {
    std::vector<std::pair<std::string, std::string>> all;
    for (const auto& [name, parts] : places_)
        for (const auto& [part, slice] : parts) all.emplace_back(name, part);
    return all;
}

int64_t DeviceWeights::num_bytes() const {
    int64_t total = 0;
    for (const auto& [name, parts] : places_)
        for (const auto& [part, slice] : parts) total += slice.num_bytes;
    return total;
}

DeviceFormat DeviceWeights::format_of(const std::string& name) const {
    const auto found = formats_.find(name);
    if (found == formats_.end()) throw Error("weights: " + name + " is missing");
    return found->second;
}

}  // namespace gemma2_fast
