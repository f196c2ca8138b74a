#pragma once

#include <cstdint>
#include <string>

#include "cuda/device_weights.h"
#include "cuda/product.h"
#include "cuda/step_context.h"

namespace gemma2_fast {

// From normed rows to the branch that is added to the residual.
class GatedMlp {
  public:
    GatedMlp(const std::string& prefix, int64_t model_width, int64_t mlp_width, bool biased, int64_t most_tokens,
             KernelSet& kernels, DeviceWeights& weights);

    void enqueue(const StepContext& step) const;
    int64_t width() const { return down_.matrix().cols; }

  private:
    Product gate_up_, down_;
    const Kernel& geglu_;  // after a product of many tokens, which leaves gate and up apart
};

}  // namespace gemma2_fast
