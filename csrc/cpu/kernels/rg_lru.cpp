#include "cpu/kernels/declarations.h"
#include "cpu/vector_math.h"

GEMMA2_FAST_BEGIN_ISA
namespace {

struct Step {
    F32 kept;   // a
    F32 added;  // what comes to a times the state
};

Step gated(F32 x, F32 input_gate, F32 recurrence_gate, F32 log_decay) {
    const F32 log_a = mul(log_decay, sigmoid(recurrence_gate));
    const F32 damping = sqrt(sub(broadcast(0.0f), exp_minus_one(add(log_a, log_a))));
    return {exp(log_a), mul(mul(x, sigmoid(input_gate)), damping)};
}

}  // namespace

void rg_lru(const RgLruTask& task) {
    for (int64_t channel = 0; channel < task.num_channels; channel += kLanes) {
        const int64_t rest = task.num_channels - channel, count = rest < kLanes ? rest : kLanes;
        const auto at = [&](const float* rows, int64_t stride, int64_t token) {
            return load_first(rows + token * stride + channel, count);
        };
        const F32 log_decay = load_first(task.log_decay + channel, count);
        F32 state = load_first(task.state + channel, count);
        for (int64_t token = 0; token < task.num_tokens; ++token) {
            const F32 x = at(task.x, task.x_stride, token);
            const F32 input_gate = at(task.input_gate, task.gate_stride, token);
            if (task.starts && token == 0) {
                state = mul(x, sigmoid(input_gate));
            } else {
                const Step step = gated(x, input_gate, at(task.recurrence_gate, task.gate_stride, token), log_decay);
                state = fma(step.kept, state, step.added);
            }
            store_first(task.out + token * task.out_stride + channel, state, count);
        }
        store_first(task.state + channel, state, count);
    }
}

GEMMA2_FAST_END_ISA
