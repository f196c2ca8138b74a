#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "runtime/logits_row.h"
#include "runtime/sequence.h"
#include "runtime/token_event.h"

namespace gemma2_fast {

// A number in [0, 1) that depends on nothing but the two arguments, so that a seeded sequence draws the same numbers
// whatever shares its batch and however often it is preempted.
double uniform_draw(uint64_t seed, uint64_t token_index);

// Turns rows of logits [V] into tokens. One row at a time: scan, then ask. Buffers are reused from row to row.
// softcap: the model's final cap, which the rows still lack. Greedy choice needs none of it, top-k caps k logits, and
// whatever sums over the row or changes logits caps all.
class Sampler {
  public:
    Sampler(int64_t vocab_size, std::optional<float> softcap);

    // Borrows the row. False if it holds NaN or +inf, or nothing above -inf.
    bool scan(std::span<const float> logits);

    void copy_values(std::span<float> out) const { raw_.copy_values(out); }  // the scanned row, capped

    // The log-probability of a token of the scanned row, and of the num_top likeliest.
    TokenLogprob logprob(int32_t token_id, int64_t num_top);

    // The sequence's next token: logit bias, penalties and masks, then temperature, top-k, top-p, min-p and one draw.
    // Ties at the edge of top-k and top-p go to the lower id. None: bias and masks left no token.
    std::optional<int32_t> choose(const Sequence& sequence);

  private:
    bool adjust(const Sequence& sequence);
    std::optional<int32_t> draw(LogitsRow& row, const SamplingParams& params, uint64_t token_index);
    void keep_nucleus(double target);

    std::optional<float> softcap_;
    LogitsRow raw_;
    LogitsRow adjusted_;
    std::vector<float> adjusted_logits_;
    std::vector<int32_t> count_;  // [V], all zero between uses
    std::vector<Candidate> candidates_;
    std::vector<Candidate> scratch_;
};

}  // namespace gemma2_fast
