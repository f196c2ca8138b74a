#include "cuda/token_chooser.h"

#include <algorithm>

#include "cuda/launch_sizes.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kFewestBlocks = 128;  // that kernels are compiled for

}  // namespace

TokenChooser::TokenChooser(int64_t vocab_size, std::optional<float> softcap, int64_t most_rows, KernelSet& kernels,
                           Arena& arena)
    : vocab_size_(vocab_size), softcap_(softcap), scan_(&kernels.find("sample_scan", {})) {
    const int64_t blocks = divide_up(vocab_size, scan_->constant("BLOCK"));
    const KernelSet::Constants row{{"CAPPED", softcap.has_value()},
                                   {"BLOCKS", std::max(kFewestBlocks, power_of_two(blocks))}};
    weigh_ = &kernels.find("sample_weigh", row);
    draw_ = &kernels.find("sample_draw", row);
    firsts_ = arena.reserve(most_rows * blocks * kI64Bytes);
    best_ = arena.reserve(most_rows * blocks * scan_->constant("KEEP") * kI64Bytes);
    sums_ = arena.reserve(most_rows * blocks * kF64Bytes);
}

bool TokenChooser::always_chooses(const SamplingParams& params) const {
    const bool few = params.top_k.value_or(vocab_size_) <= scan_->constant("KEEP");
    const bool all = !params.top_k && params.top_p >= 1 && params.min_p <= 0;
    return params.temperature == 0 || few || all;
}

void TokenChooser::enqueue(const StepContext& step) const {
    const std::vector<KernelArgument> arguments{
        {"logits", step.at(step.rows.logits)},
        {"vocab", i32(vocab_size_)},
        {"cap", softcap_.value_or(1.0f)},
        {"temperature", step.inputs.temperature},
        {"top_k", step.inputs.top_k},
        {"top_p", step.inputs.top_p},
        {"min_p", step.inputs.min_p},
        {"seed", step.inputs.seed},
        {"token_index", step.inputs.token_index},
        {"firsts", step.at(firsts_)},
        {"best", step.at(best_)},
        {"sums", step.at(sums_)},
        {"out", step.at(step.rows.chosen)},
    };
    const int64_t rows = step.shape.num_logits;
    const LaunchGrid blocks{.x = divide_up(vocab_size_, scan_->constant("BLOCK")), .y = rows};
    scan_->launch(step.stream, blocks, arguments);
    weigh_->launch(step.stream, blocks, arguments);
    draw_->launch(step.stream, {.x = rows}, arguments);
}

}  // namespace gemma2_fast
