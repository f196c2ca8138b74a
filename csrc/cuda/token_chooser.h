#pragma once

#include <cstdint>
#include <optional>

#include "cuda/step_context.h"
#include "runtime/request.h"

namespace gemma2_fast {

// Chooses the next token of each row of logits on the device, by the rules among the step's inputs.
class TokenChooser {
  public:
    TokenChooser(int64_t vocab_size, std::optional<float> softcap, int64_t most_rows, KernelSet& kernels, Arena& arena);

    void enqueue(const StepContext& step) const;
    // More of a block of the vocabulary than are kept can only count where top_p or min_p, or a larger top_k, decides.
    bool always_chooses(const SamplingParams& params) const;

  private:
    int64_t vocab_size_;
    std::optional<float> softcap_;
    const Kernel *scan_, *weigh_, *draw_;
    Arena::Slice firsts_, best_, sums_;  // of the blocks of the vocabulary: [L, blocks], [L, blocks, KEEP], [L, blocks]
};

}  // namespace gemma2_fast
