#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace gemma2_fast {

enum class FinishReason { kStop, kLength, kCancelled, kError };

// Natural log of a token's probability under the raw logits: before bias, penalties and temperature.
struct TokenLogprob {
    int32_t token_id = 0;
    float logprob = 0;
    std::vector<std::pair<int32_t, float>> top;  // the likeliest tokens and their logprobs, likeliest first
};

// What one step told about one sequence. The event with a finish_reason is the sequence's last. With kStop, token_id is
// the stop token itself, so that the reader can leave its text out; with kCancelled and kError there is no token.
struct TokenEvent {
    int64_t sequence_id = 0;
    std::optional<int32_t> token_id;
    std::optional<TokenLogprob> logprob;        // of token_id, if the request asked
    std::vector<TokenLogprob> prompt_logprobs;  // the next rows, from the prompt's second token on; none comes twice
    std::optional<FinishReason> finish_reason;
    std::optional<std::string> message;  // why, for kCancelled and kError
    int64_t time_ns = 0;                 // std::chrono::steady_clock
};

}  // namespace gemma2_fast
