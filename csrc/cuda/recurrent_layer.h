#pragma once

#include <cstdint>
#include <string>

#include "cuda/device_weights.h"
#include "cuda/product.h"
#include "cuda/step_context.h"
#include "runtime/cache_plan.h"
#include "spec/model_spec.h"

namespace gemma2_fast {

// What sequences carry through a layer, a slot each and one more that is nobody's.
struct RecurrentStates {
    Arena::Slice states;       // [slots, R] float32
    Arena::Slice inputs_ring;  // [slots, taps, R] bfloat16: the convolution's input of position p in row p % taps

    static RecurrentStates reserve(Arena& arena, const RecurrentStateGroup& group);
};

// Rows of a step of many tokens between the kernels of a layer.
struct RecurrentScratch {
    Arena::Slice conv;   // [T, R] bfloat16
    Arena::Slice gates;  // [2, T, R] float32

    static RecurrentScratch reserve(Arena& arena, int64_t most_tokens, int64_t width);
};

// The mixer of a recurrent layer: from normed rows to the branch that is added to the residual.
class RecurrentLayer {
  public:
    RecurrentLayer(const RecurrentSpec& spec, const std::string& prefix, int64_t model_width, int64_t most_tokens,
                   KernelSet& kernels, DeviceWeights& weights);

    void join(RecurrentStates states) { states_ = states; }
    void enqueue(const StepContext& step, const RecurrentScratch& scratch) const;
    void copy_state(StateCopy slots, const Arena& arena, Stream& stream) const;

    const RecurrentSpec& spec() const { return spec_; }
    int64_t mixed_width() const { return xy_.matrix().rows; }
    int64_t attended_width() const { return spec_.width; }

  private:
    void advance_by_one(const StepContext& step) const;
    void advance(const StepContext& step, const RecurrentScratch& scratch) const;
    std::vector<KernelArgument> arguments(const StepContext& step) const;

    RecurrentSpec spec_;
    Product xy_, out_;  // rows of linear_x, then of linear_y
    Arena::Slice conv_, conv_bias_, decay_;
    Arena::Slice input_gate_, input_gate_bias_, recurrence_gate_, recurrence_gate_bias_;
    const Kernel *step_, *conv1d_, *gates_, *scan_;
    RecurrentStates states_;
};

}  // namespace gemma2_fast
