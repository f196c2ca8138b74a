#include "cpu/kernels/declarations.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// 32 partial sums on every instruction set: element i goes to sum i % 32, so the scalar path is as exact as the widest.
constexpr int64_t kPartialSums = 32;
constexpr int64_t kVectors = kPartialSums / kLanes;

float mean_square(const float* x, int64_t width) {
    F32 sums[kVectors];
    for (F32& sum : sums) sum = broadcast(0.0f);
    int64_t i = 0;
    for (; i + kPartialSums <= width; i += kPartialSums)
        for (int64_t v = 0; v < kVectors; ++v) {
            F32 element = load(x + i + v * kLanes);
            sums[v] = fma(element, element, sums[v]);
        }
    for (int64_t v = 0; i < width; i += kLanes, ++v) {
        int64_t rest = width - i < kLanes ? width - i : kLanes;
        F32 element = load_first(x + i, rest);
        sums[v] = fma(element, element, sums[v]);
    }
    for (int64_t half = kVectors / 2; half > 0; half /= 2)
        for (int64_t v = 0; v < half; ++v) sums[v] = add(sums[v], sums[v + half]);
    return reduce_add(sums[0]) / static_cast<float>(width);
}

template <bool kAddsToOut>
void normalise(const float* x, const float* gain, float epsilon, int64_t num_rows, int64_t width, float* out) {
    for (int64_t row = 0; row < num_rows; ++row, x += width, out += width) {
        F32 inverse = broadcast(1.0f / __builtin_sqrtf(mean_square(x, width) + epsilon));
        int64_t i = 0;
        for (; i + kLanes <= width; i += kLanes) {
            F32 y = mul(mul(load(x + i), inverse), load(gain + i));
            store(out + i, kAddsToOut ? add(load(out + i), y) : y);
        }
        if (i < width) {
            F32 y = mul(mul(load_first(x + i, width - i), inverse), load_first(gain + i, width - i));
            store_first(out + i, kAddsToOut ? add(load_first(out + i, width - i), y) : y, width - i);
        }
    }
}

}  // namespace

void rms_norm(const float* x, const float* gain, float epsilon, int64_t num_rows, int64_t width, float* out) {
    normalise<false>(x, gain, epsilon, num_rows, width, out);
}

void rms_norm_add(const float* x, const float* gain, float epsilon, int64_t num_rows, int64_t width, float* residual) {
    normalise<true>(x, gain, epsilon, num_rows, width, residual);
}

GEMMA2_FAST_END_ISA
