#pragma once

#include <span>

#include "runtime/step_batch.h"

namespace gemma2_fast {

// What a backend is to the decode loop: one virtual call a step.
class ModelStep {
  public:
    virtual ~ModelStep() = default;

    // Appends the batch's tokens to the cache and writes the next-token logits of the asked rows. A final soft cap is
    // left to the reader: it keeps the order, so few of the logits ever need it.
    // logits: float32 [L, V], row l belongs to batch.logits_token[l].
    virtual void run(const StepBatch& batch, std::span<float> logits) = 0;
};

}  // namespace gemma2_fast
