#include "cpu/kernels/declarations.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA

void add(const float* x, int64_t count, float* residual) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(residual + i, add(load(residual + i), load(x + i)));
    if (i < count) {
        int64_t rest = count - i;
        store_first(residual + i, add(load_first(residual + i, rest), load_first(x + i, rest)), rest);
    }
}

void scale(float* x, int64_t count, float factor) {
    const F32 factors = broadcast(factor);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(x + i, mul(load(x + i), factors));
    if (i < count) store_first(x + i, mul(load_first(x + i, count - i), factors), count - i);
}

GEMMA2_FAST_END_ISA
