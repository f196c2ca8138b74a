#include "cuda/recurrent_layer.h"

#include "cuda/launch_sizes.h"

namespace gemma2_fast {
RecurrentStates RecurrentStates::reserve(Arena& arena, const RecurrentStateGroup& group) {
    const int64_t numbers = (group.num_slots + 1) * group.width;
    return {.states = arena.reserve(numbers * kF32Bytes),
            .inputs_ring = arena.reserve((group.conv_tail + 1) * numbers * kBF16Bytes)};
}

RecurrentScratch RecurrentScratch::reserve(Arena& arena, int64_t most_tokens, int64_t width) {
    return {.conv = arena.reserve(most_tokens * width * kBF16Bytes),
            .gates = arena.reserve(2 * most_tokens * width * kF32Bytes)};
}

RecurrentLayer::RecurrentLayer(const RecurrentSpec& spec, const std::string& prefix, int64_t model_width,
                               int64_t most_tokens, KernelSet& kernels, DeviceWeights& weights)
    : spec_(spec),
      xy_(kernels,
          weights.matrix({{prefix + "linear_x", spec.width}, {prefix + "linear_y", spec.width}}, model_width, true),
          ProductKind::kPlain, most_tokens),
      out_(kernels, weights.matrix({{prefix + "linear_out", model_width}}, spec.width, true), ProductKind::kPlain,
           most_tokens),
      conv_(weights.vector(prefix + "conv", spec.width * spec.conv_width)),
      conv_bias_(weights.vector(prefix + "conv_bias", spec.width)),
      decay_(weights.vector(prefix + "decay", spec.width)),
      input_gate_(weights.rows(prefix + "input_gate", spec.width * (spec.width / spec.num_gate_blocks))),
      input_gate_bias_(weights.vector(prefix + "input_gate_bias", spec.width)),
      recurrence_gate_(weights.rows(prefix + "recurrence_gate", spec.width * (spec.width / spec.num_gate_blocks))),
      recurrence_gate_bias_(weights.vector(prefix + "recurrence_gate_bias", spec.width)) {
    const KernelSet::Constants block{{"BLOCK_WIDTH", spec.width / spec.num_gate_blocks}};
    const KernelSet::Constants taps{{"TAPS", spec.conv_width}};
    KernelSet::Constants both = block;
    both.insert(taps.begin(), taps.end());
    step_ = &kernels.find("rg_lru_step", both);
    conv1d_ = &kernels.find("conv1d", taps);
    gates_ = &kernels.find("rg_lru_gates", block);
    scan_ = &kernels.find("rg_lru_scan", taps);
}

void RecurrentLayer::enqueue(const StepContext& step, const RecurrentScratch& scratch) const {
    const int64_t num_tokens = step.shape.num_tokens;
    xy_.launch(step.stream, step.arena, step.at(step.rows.normed), step.at(step.rows.mixed), num_tokens);
    if (step.shape.is_decode)
        advance_by_one(step);
    else
        advance(step, scratch);
    out_.launch(step.stream, step.arena, step.at(step.rows.attended), step.at(step.rows.branch), num_tokens);
}

// A ring's rows are those of absolute positions, so whoever goes on from the same position finds them in their places.
void RecurrentLayer::copy_state(StateCopy slots, const Arena& arena, Stream& stream) const {
    const auto [from, to] = slots;
    const auto copy = [&](const Arena::Slice& slice, int64_t slot_bytes) {
        stream.copy_on_device(arena.at(slice, to * slot_bytes), arena.at(slice, from * slot_bytes), slot_bytes);
    };
    copy(states_.states, spec_.width * kF32Bytes);
    copy(states_.inputs_ring, spec_.conv_width * spec_.width * kBF16Bytes);
}

// One new token a sequence: a single kernel.
void RecurrentLayer::advance_by_one(const StepContext& step) const {
    step_->launch(step.stream,
                  {.x = divide_up(spec_.width, step_->constant("CHANNELS")),
                   .y = divide_up(step.shape.num_sequences, step_->constant("SEQUENCES"))},
                  arguments(step));
}

void RecurrentLayer::advance(const StepContext& step, const RecurrentScratch& scratch) const {
    const int64_t num_tokens = step.shape.num_tokens;
    const CUdeviceptr conv = step.at(scratch.conv), gates = step.at(scratch.gates);
    std::vector<KernelArgument> convolved = arguments(step), scanned = convolved;
    convolved.back() = {"out", conv};
    conv1d_->launch(step.stream, {.x = num_tokens, .y = divide_up(spec_.width, conv1d_->constant("BLOCK"))}, convolved);
    gates_->launch(step.stream,
                   {.x = divide_up(num_tokens, gates_->constant("TILE_TOKENS")),
                    .y = divide_up(spec_.width, gates_->constant("TILE_CHANNELS"))},
                   {{"conv", conv},
                    {"input_gate", step.at(input_gate_)},
                    {"recurrence_gate", step.at(recurrence_gate_)},
                    {"input_gate_bias", step.at(input_gate_bias_)},
                    {"recurrence_gate_bias", step.at(recurrence_gate_bias_)},
                    {"gates", gates},
                    {"width", i32(spec_.width)},
                    {"num_tokens", i32(num_tokens)}});
    scanned.insert(scanned.end(), {{"conv", conv}, {"gates", gates}, {"num_tokens", i32(num_tokens)}});
    scan_->launch(step.stream,
                  {.x = divide_up(spec_.width, scan_->constant("CHANNELS")), .y = step.shape.num_sequences}, scanned);
}

// Of all its kernels; `out` is the last.
std::vector<KernelArgument> RecurrentLayer::arguments(const StepContext& step) const {
    const CUdeviceptr x = step.at(step.rows.mixed);
    return {{"x", x},
            {"y", x + static_cast<CUdeviceptr>(spec_.width * kBF16Bytes)},
            {"row_stride", i32(mixed_width())},
            {"inputs_ring", step.at(states_.inputs_ring)},
            {"states", step.at(states_.states)},
            {"state_slot", step.inputs.state_slot},
            {"first_token", step.inputs.first_token},
            {"context_tokens", step.inputs.context_tokens},
            {"token_sequence", step.inputs.token_sequence},
            {"positions", step.inputs.positions},
            {"weight", step.at(conv_)},
            {"bias", step.at(conv_bias_)},
            {"input_gate", step.at(input_gate_)},
            {"recurrence_gate", step.at(recurrence_gate_)},
            {"input_gate_bias", step.at(input_gate_bias_)},
            {"recurrence_gate_bias", step.at(recurrence_gate_bias_)},
            {"decay", step.at(decay_)},
            {"width", i32(spec_.width)},
            {"num_sequences", i32(step.shape.num_sequences)},
            {"out", step.at(step.rows.attended)}};
}

}  // namespace gemma2_fast
