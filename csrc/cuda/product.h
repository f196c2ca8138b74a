#pragma once

#include <cstdint>
#include <optional>

#include "cuda/arena.h"
#include "cuda/kernel.h"

namespace gemma2_fast {

// How a matrix lies on the device, row after row; values are the kernels' constant FORMAT.
enum class DeviceFormat : int64_t {
    kBF16 = 0,
    kInt8 = 1,  // codes, and a bfloat16 scale for 128 columns
    kInt4 = 2,  // codes of four bits, the same scales, and a factor of four bits for 32 columns
};

struct DeviceMatrix {
    DeviceFormat format = DeviceFormat::kBF16;
    int64_t rows = 0, cols = 0;
    Arena::Slice weight{}, scales{}, factors{};
    std::optional<Arena::Slice> bias{};  // [rows] float32
};

// What becomes of the products of a matrix and rows of bfloat16.
enum class ProductKind {
    kPlain,
    kGated,  // rows of gate, then of up: gelu(gate) * up, where the tokens are few
    kHead,   // of some tokens only, in float32
};

inline constexpr int64_t kFewTokens = 16;  // products of so many tokens stream the weights

// A matrix with its kernels, which differ by the number of tokens.
class Product {
  public:
    // most_tokens: a kernel for many is not looked for where there are never so many.
    Product(KernelSet& kernels, const DeviceMatrix& matrix, ProductKind kind, int64_t most_tokens);

    const DeviceMatrix& matrix() const { return matrix_; }
    // out[t] = matrix x[t]; a gated product of many tokens leaves gate and up apart.
    void launch(Stream& stream, const Arena& arena, CUdeviceptr x, CUdeviceptr out, int64_t num_tokens) const;
    // The same for a few rows of x, which row_index names.
    void launch_gathered(Stream& stream, const Arena& arena, CUdeviceptr x, CUdeviceptr row_index, CUdeviceptr out,
                         int64_t num_rows) const;

  private:
    std::vector<KernelArgument> arguments(const Arena& arena, CUdeviceptr x, CUdeviceptr out, int64_t num_tokens) const;

    DeviceMatrix matrix_;
    int64_t out_rows_;
    const Kernel* one_;
    const Kernel* few_;
    const Kernel* many_ = nullptr;
};

}  // namespace gemma2_fast
