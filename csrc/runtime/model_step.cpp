#include "runtime/model_step.h"

#include "base/errors.h"

namespace gemma2_fast {

void ModelStep::start(const StepBatch&, std::span<const TokenChoice>) {
    throw BackendError("this backend leaves the choice of tokens to the host");
}

void ModelStep::finish(std::span<int32_t>) { throw BackendError("no step was started"); }

void ModelStep::copy_logits(std::span<float>) { throw BackendError("this backend keeps no logits"); }

}  // namespace gemma2_fast
