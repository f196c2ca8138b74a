#include "cpu/kernels/declarations.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

// Row `token` of the inputs, those before the first of x being the tail.
const float* row(const Conv1dTask& task, int64_t token) {
    if (token < 0) return task.tail + (token + task.num_taps - 1) * task.tail_stride;
    return task.x + token * task.x_stride;
}

}  // namespace

void conv1d(const Conv1dTask& task) {
    const int64_t before = task.num_taps - 1, channels = task.num_channels;
    for (int64_t token = 0; token < task.num_tokens; ++token) {
        float* out = task.out + token * task.out_stride;
        for (int64_t channel = 0; channel < channels; channel += kLanes) {
            const int64_t count = channels - channel < kLanes ? channels - channel : kLanes;
            F32 sum = load_first(task.bias + channel, count);
            for (int64_t tap = 0; tap < task.num_taps; ++tap) {
                const F32 weights = load_first(task.weights + tap * task.weights_stride + channel, count);
                sum = fma(weights, load_first(row(task, token + tap - before) + channel, count), sum);
            }
            store_first(out + channel, sum, count);
        }
    }
    // Upwards, so that a row of the tail is read before it is written.
    for (int64_t i = 0; i < before; ++i)
        std::memcpy(task.tail + i * task.tail_stride, row(task, task.num_tokens + i - before),
                    static_cast<size_t>(channels) * sizeof(float));
}

GEMMA2_FAST_END_ISA
