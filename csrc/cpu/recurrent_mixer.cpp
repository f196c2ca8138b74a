#include "cpu/recurrent_mixer.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kChannelsPerTask = 64;  // whose gates and recurrence a thread computes at once
constexpr int64_t kTokensAtOnce = 128;    // so that the gates of a task stay in a second-level cache

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

AlignedBuffer<float> floats(int64_t count) { return AlignedBuffer<float>(static_cast<std::size_t>(count)); }

}  // namespace

RecurrentMixer::RecurrentMixer(const Kernels& kernels, const RecurrentStateGroup& group, int64_t most_block_width,
                               int num_threads, int64_t max_step_tokens)
    : kernels_(kernels),
      group_(group),
      layer_floats_((1 + group.conv_tail) * group.width),
      slot_floats_(static_cast<int64_t>(group.layers.size()) * layer_floats_),
      matmul_scratch_floats_(divide_up(kernels.matmul_scratch_floats(most_block_width), 16) * 16),
      scratch_floats_(matmul_scratch_floats_ + 2 * kTokensAtOnce * kChannelsPerTask),
      states_(floats(group.num_slots * slot_floats_)),
      inputs_(floats(max_step_tokens * group.width)),
      gates_(floats(max_step_tokens * group.width)),
      conv_(floats(max_step_tokens * group.width)),
      scratch_(floats(num_threads * scratch_floats_)) {}

void RecurrentMixer::poison() { std::memset(states_.data(), 0xff, states_.size() * sizeof(float)); }

void RecurrentMixer::copy_states(std::span<const StateCopy> copies) {
    for (const auto& [from, to] : copies)
        std::copy_n(states_.data() + from * slot_floats_, slot_floats_, states_.data() + to * slot_floats_);
}

const float* RecurrentMixer::run(const CpuRecurrent& layer, const StepBatch& batch, ThreadPool& threads) {
    const int64_t num_blocks = layer.spec.num_gate_blocks, block_width = group_.width / num_blocks;
    threads.parallel_for(num_blocks, [&](int64_t block, int) { convolve(layer, batch, block); });
    const int64_t parts = divide_up(block_width, kChannelsPerTask);
    threads.parallel_for(num_blocks * parts, [&](int64_t task, int thread) {
        const int64_t block_first = task / parts * block_width, part_first = task % parts * kChannelsPerTask;
        const Channels channels{block_first + part_first, std::min(kChannelsPerTask, block_width - part_first),
                                block_first, block_width};
        recur(layer, batch, channels, scratch_.data() + thread * scratch_floats_);
    });
    return gates_.data();
}

void RecurrentMixer::convolve(const CpuRecurrent& layer, const StepBatch& batch, int64_t block) {
    const int64_t width = group_.width, num_channels = width / layer.spec.num_gate_blocks;
    const int64_t first_channel = block * num_channels;
    for (int64_t s = 0; s < batch.num_sequences(); ++s) {
        const int64_t first = batch.first_token[s];
        float* tail = state(layer, batch.state_slot[s]) + width + first_channel;
        if (batch.context_tokens[s] == 0)
            for (int64_t i = 0; i < group_.conv_tail; ++i) std::fill_n(tail + i * width, num_channels, 0.0f);
        kernels_.conv1d({.x = inputs_.data() + first * width + first_channel,
                         .x_stride = width,
                         .tail = tail,
                         .tail_stride = width,
                         .weights = layer.conv_weights.data() + first_channel,
                         .weights_stride = width,
                         .bias = layer.conv_bias.data() + first_channel,
                         .num_taps = layer.spec.conv_width,
                         .num_tokens = batch.first_token[s + 1] - first,
                         .num_channels = num_channels,
                         .out = conv_.data() + first_channel * batch.num_tokens() + first * num_channels,
                         .out_stride = num_channels});
    }
}

// Some channels for every token: both gates, the recurrence, and the product with the other branch.
void RecurrentMixer::recur(const CpuRecurrent& layer, const StepBatch& batch, const Channels& channels,
                           float* scratch) {
    const int64_t width = group_.width;
    float* input_gate = scratch + matmul_scratch_floats_;
    float* recurrence_gate = input_gate + kTokensAtOnce * kChannelsPerTask;
    for (int64_t first = 0; first < batch.num_tokens(); first += kTokensAtOnce) {
        const int64_t end = std::min(first + kTokensAtOnce, batch.num_tokens());
        const float* conv = conv_.data() + channels.block_first * batch.num_tokens() + first * channels.block_width;
        compute_gate(layer.input_gate, channels, conv, end - first, input_gate, scratch);
        compute_gate(layer.recurrence_gate, channels, conv, end - first, recurrence_gate, scratch);
        RgLruTask task;
        task.x = conv + channels.first - channels.block_first;
        task.x_stride = channels.block_width;
        task.input_gate = input_gate;
        task.recurrence_gate = recurrence_gate;
        task.gate_stride = kChannelsPerTask;
        task.log_decay = layer.log_decay.data() + channels.first;
        task.num_channels = channels.count;
        task.out = inputs_.data() + first * width + channels.first;
        task.out_stride = width;
        advance(layer, batch, first, end, channels.first, task);
        for (int64_t t = first; t < end; ++t) {
            float* gate = gates_.data() + t * width + channels.first;
            kernels_.geglu(gate, inputs_.data() + t * width + channels.first, channels.count, gate);
        }
    }
}

void RecurrentMixer::compute_gate(const Gate& gate, const Channels& channels, const float* conv, int64_t num_tokens,
                                  float* out, float* scratch) {
    kernels_.matmul(gate.blocks, channels.first, channels.first + channels.count, conv, num_tokens,
                    out - channels.first, kChannelsPerTask, scratch);
    for (int64_t t = 0; t < num_tokens; ++t)
        kernels_.add(gate.bias.data() + channels.first, channels.count, out + t * kChannelsPerTask);
}

// `rows` holds tokens [first, end) of the batch; each sequence's part of them goes on from its own state.
void RecurrentMixer::advance(const CpuRecurrent& layer, const StepBatch& batch, int64_t first, int64_t end,
                             int64_t first_channel, const RgLruTask& rows) {
    for (int64_t s = 0; s < batch.num_sequences(); ++s) {
        const int64_t begin = std::max<int64_t>(first, batch.first_token[s]);
        const int64_t stop = std::min<int64_t>(end, batch.first_token[s + 1]);
        if (begin >= stop) continue;
        RgLruTask task = rows;
        task.x += (begin - first) * rows.x_stride;
        task.input_gate += (begin - first) * rows.gate_stride;
        task.recurrence_gate += (begin - first) * rows.gate_stride;
        task.state = state(layer, batch.state_slot[s]) + first_channel;
        task.starts = batch.positions[begin] == 0;
        task.num_tokens = stop - begin;
        task.out += (begin - first) * rows.out_stride;
        kernels_.rg_lru(task);
    }
}

float* RecurrentMixer::state(const CpuRecurrent& layer, int32_t slot) {
    return states_.data() + slot * slot_floats_ + layer.group_layer * layer_floats_;
}

}  // namespace gemma2_fast
