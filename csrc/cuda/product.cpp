#include "cuda/product.h"

#include "cuda/launch_sizes.h"

namespace gemma2_fast {

Product::Product(KernelSet& kernels, const DeviceMatrix& matrix, ProductKind kind, int64_t most_tokens)
    : matrix_(matrix), out_rows_(kind == ProductKind::kGated ? matrix.rows / 2 : matrix.rows) {
    const auto format = static_cast<int64_t>(matrix.format);
    const auto streaming = [&](int64_t tokens) {
        return &kernels.find("matmul",
                             {{"FORMAT", format},
                              {"BIASED", matrix.bias.has_value()},
                              {"GEGLU", kind == ProductKind::kGated},
                              {"GATHER", kind == ProductKind::kHead},
                              {"TOKENS", tokens}},
                             {{"out", kind == ProductKind::kHead ? "*fp32" : "*bf16"}});
    };
    one_ = streaming(1);
    few_ = streaming(kFewTokens);
    if (kind != ProductKind::kHead && most_tokens > kFewTokens)
        many_ = &kernels.find("matmul_tiled", {{"FORMAT", format}, {"BIASED", matrix.bias.has_value()}});
}

void Product::launch(Stream& stream, const Arena& arena, CUdeviceptr x, CUdeviceptr out, int64_t num_tokens) const {
    if (num_tokens <= kFewTokens) return launch_gathered(stream, arena, x, x, out, num_tokens);
    std::vector<KernelArgument> all = arguments(arena, x, out, num_tokens);
    all.push_back({"rows", i32(matrix_.rows)});
    const int64_t tiles =
        divide_up(num_tokens, many_->constant("TILE_TOKENS")) * divide_up(matrix_.rows, many_->constant("TILE_ROWS"));
    many_->launch(stream, {.x = tiles}, all);
}

void Product::launch_gathered(Stream& stream, const Arena& arena, CUdeviceptr x, CUdeviceptr row_index, CUdeviceptr out,
                              int64_t num_rows) const {
    const Kernel& kernel = num_rows == 1 ? *one_ : *few_;
    std::vector<KernelArgument> all = arguments(arena, x, out, num_rows);
    all.push_back({"rows", i32(out_rows_)});
    all.push_back({"row_index", row_index});
    kernel.launch(stream, {.x = divide_up(out_rows_, kernel.constant("ROWS"))}, all);
}

std::vector<KernelArgument> Product::arguments(const Arena& arena, CUdeviceptr x, CUdeviceptr out,
                                               int64_t num_tokens) const {
    return {{"x", x},
            {"weight", arena.at(matrix_.weight)},
            {"scales", arena.at(matrix_.scales)},
            {"factors", arena.at(matrix_.factors)},
            {"bias", arena.at(matrix_.bias.value_or(matrix_.weight))},
            {"out", out},
            {"cols", i32(matrix_.cols)},
            {"num_tokens", i32(num_tokens)}};
}

}  // namespace gemma2_fast
