#include "cpu/kernels/declarations.h"
#include "cpu/kernels/dequantize_formats.h"

GEMMA2_FAST_BEGIN_ISA

void dequantize_row(WeightType type, const std::byte* row, int64_t cols, float* out) {
    with_format(type, [=]<typename Format>() {
        unpack_row<Format>(
            row, cols, [=](int64_t col, F32 weights) { store(out + col, weights); },
            [=](int64_t col, F32 weights) { store_first(out + col, weights, cols - col); });
    });
}

GEMMA2_FAST_END_ISA
