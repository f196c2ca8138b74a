#include "cpu/kernels/declarations.h"
#include "cpu/vector_math.h"

GEMMA2_FAST_BEGIN_ISA

void softcap(float* x, int64_t count, float cap) {
    const F32 caps = broadcast(cap);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(x + i, mul(caps, tanh(div(load(x + i), caps))));
    if (i < count) store_first(x + i, mul(caps, tanh(div(load_first(x + i, count - i), caps))), count - i);
}

GEMMA2_FAST_END_ISA
