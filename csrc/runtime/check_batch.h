#pragma once

#include <cstdint>

#include "runtime/cache_plan.h"
#include "runtime/step_batch.h"

namespace gemma2_fast {

// What a model step was made for.
struct StepLimits {
    int64_t max_step_tokens = 0;
    int64_t max_logits_rows = 0;
    int64_t vocab_size = 0;
};

// Throws Error where a batch exceeds the limits, has logits of another size, a page that a query may read or write has
// no block, a sequence has no state slot of its own, or a state is copied to or from where there is none: the scheduler
// may have been given other limits or another plan than the step. num_rows_before: of the step before, whose chosen
// tokens may be meant.
void check_batch(const StepBatch& batch, const CachePlan& plan, const StepLimits& limits, int64_t num_logit_values,
                 int64_t num_rows_before = 0);

}  // namespace gemma2_fast
