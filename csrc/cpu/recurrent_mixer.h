#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "cpu/cpu_layers.h"
#include "cpu/kernels.h"
#include "runtime/cache_plan.h"
#include "runtime/step_batch.h"

namespace gemma2_fast {

// What recurrent layers do between their matrices, and the states that sequences carry through them. Owns the slots of
// the cache plan's recurrent group and the rows of one step.
class RecurrentMixer {
  public:
    RecurrentMixer(const Kernels& kernels, const RecurrentStateGroup& group, int64_t most_block_width, int num_threads,
                   int64_t max_step_tokens);

    void poison();  // fills every state with NaN
    void copy_states(std::span<const StateCopy> copies);

    // Where a layer's linear_x and linear_y put their rows [T, R].
    float* inputs() { return inputs_.data(); }
    float* gates() { return gates_.data(); }
    // gelu(gates) * RG-LRU(convolution(inputs)), the rows [T, R] that linear_out reads. Advances the states.
    const float* run(const CpuRecurrent& layer, const StepBatch& batch, ThreadPool& threads);

  private:
    // Channels [first, first + count) of the gate block that begins at channel block_first.
    struct Channels {
        int64_t first, count, block_first, block_width;
    };

    void convolve(const CpuRecurrent& layer, const StepBatch& batch, int64_t block);
    void recur(const CpuRecurrent& layer, const StepBatch& batch, const Channels& channels, float* scratch);
    void compute_gate(const Gate& gate, const Channels& channels, const float* conv, int64_t num_tokens, float* out,
                      float* scratch);
    void advance(const CpuRecurrent& layer, const StepBatch& batch, int64_t first, int64_t end, int64_t first_channel,
                 const RgLruTask& rows);
    // The recurrence [R] of one sequence and layer, and behind it its convolution's last inputs [conv_tail, R].
    float* state(const CpuRecurrent& layer, int32_t slot);

    const Kernels& kernels_;
    RecurrentStateGroup group_;
    int64_t layer_floats_, slot_floats_;  // of one sequence's state
    int64_t matmul_scratch_floats_, scratch_floats_;
    AlignedBuffer<float> states_;   // [slots, layers, 1 + conv_tail, R]
    AlignedBuffer<float> inputs_;   // [T, R]: linear_x's rows, then the recurrence's
    AlignedBuffer<float> gates_;    // [T, R]
    AlignedBuffer<float> conv_;     // [blocks, T, R / blocks]
    AlignedBuffer<float> scratch_;  // [threads, scratch_floats]
};

}  // namespace gemma2_fast
