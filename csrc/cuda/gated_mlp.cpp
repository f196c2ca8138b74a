#include "cuda/gated_mlp.h"

#include "cuda/launch_sizes.h"

namespace gemma2_fast {

GatedMlp::GatedMlp(const std::string& prefix, int64_t model_width, int64_t mlp_width, bool biased, int64_t most_tokens,
                   KernelSet& kernels, DeviceWeights& weights)
    : gate_up_(kernels, weights.matrix({{prefix + "gate", mlp_width}, {prefix + "up", mlp_width}}, model_width, biased),
               ProductKind::kGated, most_tokens),
      down_(kernels, weights.matrix({{prefix + "down", model_width}}, mlp_width, biased), ProductKind::kPlain,
            most_tokens),
      geglu_(kernels.find("geglu", {})) {}

void GatedMlp::enqueue(const StepContext& step) const {
    const int64_t num_tokens = step.shape.num_tokens;
    const CUdeviceptr normed = step.at(step.rows.normed), hidden = step.at(step.rows.hidden);
    if (num_tokens <= kFewTokens) {
        gate_up_.launch(step.stream, step.arena, normed, hidden, num_tokens);
    } else {
        gate_up_.launch(step.stream, step.arena, normed, step.at(step.rows.gate_up), num_tokens);
        geglu_.launch(step.stream, {.x = num_tokens, .y = divide_up(width(), geglu_.constant("BLOCK"))},
                      {{"gate_up", step.at(step.rows.gate_up)}, {"out", hidden}, {"width", i32(width())}});
    }
    down_.launch(step.stream, step.arena, hidden, step.at(step.rows.branch), num_tokens);
}

}  // namespace gemma2_fast
