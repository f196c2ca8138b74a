#pragma once

#include <pybind11/pybind11.h>

#include "runtime/model_step.h"

namespace gemma2_fast {

// A backend written in Python: calls callable(batch) -> float32 [L, V] under the GIL, from the decode loop's thread.
class CallbackStep : public ModelStep {
  public:
    explicit CallbackStep(pybind11::function callable) : callable_(std::move(callable)) {}
    ~CallbackStep() override;

    // What the callable raises becomes an Error, so that no Python object leaves the GIL's protection.
    void run(const StepBatch& batch, std::span<float> logits) override;

  private:
    pybind11::function callable_;
};

void bind_callback_step(pybind11::module_& module);  // ModelStep must be bound

}  // namespace gemma2_fast
