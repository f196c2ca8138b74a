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

    // The same for a token that was chosen elsewhere, which `needs_only_a_choice` must have allowed. None: the chunk
    // has no next token yet.
    std::optional<TokenEvent> accept(const Chunk& chunk, std::optional<int32_t> token_id);

    // Whether nothing but the next token is wanted of the chunk's logits, and that by the plain rule of TokenChoice.
    static bool needs_only_a_choice(const Chunk& chunk);

  private:
    void read_prompt_row(Sequence& sequence, TokenEvent& event);
    void read_next_token(Sequence& sequence, TokenEvent& event);
    void append(Sequence& sequence, int32_t token_id, TokenEvent& event);
    std::optional<TokenEvent> finished(Sequence& sequence, int64_t end_position, TokenEvent event);

    int64_t vocab_size_;
    Sampler sampler_;
};

}  // namespace gemma2_fast
