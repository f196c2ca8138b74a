#include "cpu/kernels/declarations.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA

void rope(float* x, const float* cos, const float* sin, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
          int64_t num_pairs) {
    for (int64_t token = 0; token < num_tokens; ++token, cos += num_pairs, sin += num_pairs)
        for (int64_t head = 0; head < num_heads; ++head, x += head_dim) {
            float* first = x;
            float* second = x + num_pairs;
            int64_t j = 0;
            for (; j + kLanes <= num_pairs; j += kLanes) {
                F32 a = load(first + j), b = load(second + j), c = load(cos + j), s = load(sin + j);
                store(first + j, sub(mul(a, c), mul(b, s)));
                store(second + j, add(mul(b, c), mul(a, s)));
            }
            if (int64_t rest = num_pairs - j; rest > 0) {
                F32 a = load_first(first + j, rest), b = load_first(second + j, rest);
                F32 c = load_first(cos + j, rest), s = load_first(sin + j, rest);
                store_first(first + j, sub(mul(a, c), mul(b, s)), rest);
                store_first(second + j, add(mul(b, c), mul(a, s)), rest);
            }
        }
}

GEMMA2_FAST_END_ISA
