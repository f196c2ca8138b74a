#include "cpu/kernels/declarations.h"
#include "cpu/kernels/dequantize_formats.h"

GEMMA2_FAST_BEGIN_ISA

void dequantize_row(const WeightView& weight, int64_t row, float* out) {
    const int64_t cols = weight.cols;
    const auto take = [=](int64_t col, F32 weights) { store(out + col, weights); };
    const auto take_rest = [=](int64_t col, F32 weights) { store_first(out + col, weights, cols - col); };
    with_format(weight.type, [&]<typename Format>() {
        if constexpr (InStrips<Format>)
            unpack_strip_row<Format>(weight.row(row / kStripRows), row % kStripRows, 0, cols, take, take_rest);
        else
            unpack_row<Format>(weight.row(row), cols, take, take_rest);
    });
}

GEMMA2_FAST_END_ISA
