#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace gemma2_fast {

struct Candidate {
    int32_t token_id = 0;
    float logit = 0;   // before the final soft cap
    float weight = 0;  // exp((value - largest value) / temperature)
};

// The order of all choices: larger logits first, lower ids on ties. Values that the cap makes equal in float32 are no
// ties: their logits before the cap decide.
inline bool comes_first(const Candidate& a, const Candidate& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token_id < b.token_id;
}

// One row of logits [V] and the largest logit of each block of tokens, which let a search skip most of the row.
// A final soft cap never changes the order, so the search goes by the logits before it, and only what is asked for is
// capped: that is a token's value. The row is borrowed; buffers are reused from row to row.
class LogitsRow {
  public:
    void scan(std::span<const float> logits, std::optional<float> softcap);

    bool has_bad_values() const { return bad_; }  // NaN or +inf
    bool has_tokens() const;                      // at least one logit above -inf
    float largest() const { return value(largest_logit_); }
    int32_t argmax() const;
    float operator[](int64_t token_id) const { return value(logits_[token_id]); }
    float value(float logit) const;                // the logit, capped
    void copy_values(std::span<float> out) const;  // of the whole row

    double sum_weights(float temperature) const;  // of exp((value - largest) / temperature) over the row
    double log_normaliser() const;                // log(sum(exp(value))): logprob = value - log_normaliser

    // Every token with a logit above -inf whose value is at least `floor`, and maybe some just below; ids ascending.
    void at_least(float floor, float temperature, std::vector<Candidate>& out) const;
    // At most `count` tokens above -inf, those that come first in the order of comes_first, ids ascending.
    void first(int64_t count, float temperature, std::vector<Candidate>& out);

  private:
    static constexpr int64_t kBlock = 128;

    // Weights of one block's tokens, 0 past the row's end.
    void block_weights(int64_t block, float temperature, float (&weights)[kBlock]) const;
    float least_logit(float floor) const;
    void from_logit(float least, float temperature, std::vector<Candidate>& out) const;

    std::span<const float> logits_;
    std::optional<float> softcap_;
    std::vector<float> block_largest_;
    float largest_logit_ = 0;
    bool bad_ = false;
    std::vector<float> order_;
    std::vector<Candidate> scratch_;
};

}  // namespace gemma2_fast
