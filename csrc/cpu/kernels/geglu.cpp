#include "cpu/kernels/declarations.h"
#include "cpu/vector_math.h"

GEMMA2_FAST_BEGIN_ISA

void geglu(const float* gate, const float* up, int64_t count, float* out) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, mul(gelu_tanh(load(gate + i)), load(up + i)));
    if (i < count) {
        int64_t rest = count - i;
        store_first(out + i, mul(gelu_tanh(load_first(gate + i, rest)), load_first(up + i, rest)), rest);
    }
}

GEMMA2_FAST_END_ISA
