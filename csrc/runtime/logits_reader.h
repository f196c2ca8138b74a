#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "runtime/sampler.h"
#include "runtime/scheduler.h"
#include "runtime/token_event.h"

namespace gemma2_fast {

TokenEvent last_event(int64_t sequence_id, FinishReason reason, std::string message);

// What a step's logits mean to each sequence: prompt rows are copied or scored, the row after the last known token
// gives the next one.
class LogitsReader {
  public:
    explicit LogitsReader(const Limits& limits)
        : vocab_size_(limits.vocab_size), sampler_(limits.vocab_size, limits.final_softcap) {}

    // Advances chunk.sequence past its chunk. logits: [L, V] of the whole step, without the final soft cap.
    // None: the step told nothing about this sequence that anybody waits for.
    std::optional<TokenEvent> read(const Chunk& chunk, std::span<const float> logits);

  private:
    void read_prompt_row(Sequence& sequence, TokenEvent& event);
    void read_next_token(Sequence& sequence, TokenEvent& event);

    int64_t vocab_size_;
    Sampler sampler_;
};

}  // namespace gemma2_fast
