#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

namespace gemma2_fast {

// How the next token is chosen. Every member has the value that changes nothing; temperature 0 is greedy.
struct SamplingParams {
    float temperature = 0;
    std::optional<int64_t> top_k;
    float top_p = 1;
    float min_p = 0;
    float repetition_penalty = 1;  // over prompt and generated tokens: divides positive logits, multiplies the others
    float presence_penalty = 0;    // over generated tokens, once a token
    float frequency_penalty = 0;   // over generated tokens, once an occurrence
    std::vector<std::pair<int32_t, float>> logit_bias;
    uint64_t seed = 0;
    int64_t max_tokens = 0;  // 0: only the prompt's logits or log-probabilities are wanted
    int64_t min_tokens = 0;  // stop tokens cannot be chosen before
    std::vector<int32_t> stop_token_ids;
};

struct Request {
    std::vector<int32_t> token_ids;  // the prompt, used as given
    SamplingParams sampling;
    std::optional<int64_t> num_logprobs;         // alternatives a generated token; 0: the chosen token's alone
    std::optional<int64_t> num_prompt_logprobs;  // the same for every prompt token after the first
    std::optional<std::span<float>> logits_out;  // [T, V]: receives the capped logits of every prompt token
    std::shared_ptr<void> logits_owner;          // keeps logits_out alive
};

struct Limits {
    int64_t max_running_sequences = 0;
    int64_t max_step_tokens = 0;
    int64_t max_seq_len = 0;             // prompt and generated tokens
    int64_t max_logits_rows = 0;         // rows of logits a step
    int64_t vocab_size = 0;              // V
    std::optional<float> final_softcap;  // the model's, which its step leaves to whoever reads the logits
};

void check_limits(const Limits& limits);                           // throws CapacityError
void check_request(const Request& request, const Limits& limits);  // throws RequestError

}  // namespace gemma2_fast
