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

    // Whether nothing but the next token is wanted of the sequence's logits, and that by the plain rule of TokenChoice.
    // Then a step may choose it, and the sequence goes on before its token is known: `advance` puts chosen_in_row in
    // its place, `settle` the token, or none if the chunk had no row.
    static bool needs_only_a_choice(const Sequence& sequence);
    static void advance(const Chunk& chunk);
    static std::optional<TokenEvent> settle(Sequence& sequence, int64_t end_position, std::optional<int32_t> token_id);
    // Of a token that the step left to the host; the sequence's last, with the row of logits [V] before it.
    std::optional<TokenEvent> settle_by_logits(Sequence& sequence, std::span<const float> values);

  private:
    void read_row(Sequence& sequence, int64_t position, std::span<const float> values, TokenEvent& event);
    void read_prompt_row(Sequence& sequence, TokenEvent& event);
    void read_next_token(Sequence& sequence, TokenEvent& event);

    int64_t vocab_size_;
    Sampler sampler_;
};

}  // namespace gemma2_fast
