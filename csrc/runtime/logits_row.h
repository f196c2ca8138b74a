#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace gemma2_fast {

struct Candidate {
    int32_t token_id = 0;
    float logit = 0;
    float weight = 0;  // exp((logit - largest) / temperature)
};

// The order of all choices: larger logits first, lower ids on ties.
inline bool comes_first(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token_id < b.token_id;
}

// One row of logits [V] and the largest logit of each block of tokens, which let a search skip most of the row.
// The row is borrowed; buffers are reused from row to row.
class LogitsRow {
  public:
    void scan(std::span<const float> logits);

    bool has_bad_values() const { return bad_; }  // NaN or +inf
    bool has_tokens() const;                      // at least one logit above -inf
    float largest() const { return largest_; }
    int32_t argmax() const;
    float operator[](int64_t token_id) const { return logits_[token_id]; }

    double sum_weights(float temperature) const;  // of exp((logit - largest) / temperature) over the row
    double log_normaliser() const;                // log(sum(exp(logit))): logprob = logit - log_normaliser

    // Every token with a logit above -inf that is at least `floor`, ids ascending.
    void at_least(float floor, float temperature, std::vector<Candidate>& out) const;
    // At most `count` tokens above -inf, those that come first in the order of comes_first, ids ascending.
    void first(int64_t count, float temperature, std::vector<Candidate>& out);

  private:
    static constexpr int64_t kBlock = 128;

    // Weights of one block's tokens, 0 past the row's end. Same bits on every machine, unlike the C library's exp.
    void block_weights(int64_t block, float temperature, float (&weights)[kBlock]) const;

    std::span<const float> logits_;
    std::vector<float> block_largest_;
    float largest_ = 0;
    bool bad_ = false;
    std::vector<float> order_;
    std::vector<Candidate> scratch_;
};

}  // namespace gemma2_fast
