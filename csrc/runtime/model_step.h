#pragma once

#include <cstdint>
#include <span>

#include "runtime/request.h"
#include "runtime/step_batch.h"

namespace gemma2_fast {

// How the token after one row of logits is to be chosen: by temperature, top_k, top_p and min_p of the parameters
// alone.
struct TokenChoice {
    const SamplingParams* sampling = nullptr;
    uint64_t token_index = 0;  // of the sequence's generated tokens, which with the seed fixes the draw
};

inline constexpr int32_t kHostChooses = -1;

// What a backend is to the decode loop: one virtual call a step.
class ModelStep {
  public:
    virtual ~ModelStep() = default;

    // Appends the batch's tokens to the cache and writes the next-token logits of the asked rows. A final soft cap is
    // left to the reader: it keeps the order, so few of the logits ever need it.
    // logits: float32 [L, V], row l belongs to batch.logits_token[l].
    virtual void run(const StepBatch& batch, std::span<float> logits) = 0;

    // For steps that can choose tokens where their logits lie. `start` is as `run`, but returns before the step is
    // done, and no step may `run` before all are finished; `finish` waits for it and gives the token of each row, or
    // kHostChooses where that takes the row itself, which copy_logits then writes. A second step may be started before
    // the first is finished, and its token ids may be chosen_in_row of the first. Steps take effect and are finished in
    // the order of their start. If one cannot be started, that before it can still be finished; if one cannot be
    // finished, all that were started are over. choices, tokens: [L].
    virtual bool can_choose() const { return false; }
    // Whether a row of these parameters has a token for sure, if its logits are sound.
    virtual bool always_chooses(const SamplingParams&) const { return true; }
    virtual void start(const StepBatch& batch, std::span<const TokenChoice> choices);
    virtual void finish(std::span<int32_t> tokens);
    virtual void copy_logits(std::span<float> logits);  // [L, V] of the step started last
};

}  // namespace gemma2_fast
