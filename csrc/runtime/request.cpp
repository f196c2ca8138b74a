#include "runtime/request.h"

#include <cmath>
#include <limits>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

void require(bool holds, const char* name, const char* expected, double actual) {
    if (holds) return;
    std::string number = std::to_string(actual);
    if (actual == std::floor(actual) && std::fabs(actual) < 1e15) number = std::to_string(static_cast<int64_t>(actual));
    throw RequestError(std::string(name) + " must be " + expected + ", got " + number);
}

void require_token(int32_t token_id, const char* where, int64_t vocab_size) {
    if (token_id < 0 || token_id >= vocab_size)
        throw RequestError("token id " + std::to_string(token_id) + " in " + where + " is outside the vocabulary [0, " +
                           std::to_string(vocab_size) + ")");
}

// Comparisons are written so that NaN fails them.
void check_sampling(const SamplingParams& params, const Limits& limits) {
    constexpr float kLargest = std::numeric_limits<float>::max();
    require(params.temperature >= 0 && params.temperature <= kLargest, "temperature", "finite and at least 0",
            params.temperature);
    if (params.top_k) require(*params.top_k >= 1, "top_k", "at least 1, or absent", static_cast<double>(*params.top_k));
    require(params.top_p >= 0 && params.top_p <= 1, "top_p", "between 0 and 1", params.top_p);
    require(params.min_p >= 0 && params.min_p <= 1, "min_p", "between 0 and 1", params.min_p);
    require(params.repetition_penalty > 0 && params.repetition_penalty <= kLargest, "repetition_penalty",
            "finite and above 0", params.repetition_penalty);
    require(std::isfinite(params.presence_penalty), "presence_penalty", "finite", params.presence_penalty);
    require(std::isfinite(params.frequency_penalty), "frequency_penalty", "finite", params.frequency_penalty);
    require(params.max_tokens >= 0, "max_tokens", "at least 0", static_cast<double>(params.max_tokens));
    require(params.min_tokens >= 0 && params.min_tokens <= params.max_tokens, "min_tokens", "between 0 and max_tokens",
            static_cast<double>(params.min_tokens));
    for (const auto& [token_id, bias] : params.logit_bias) {
        require_token(token_id, "logit_bias", limits.vocab_size);
        require(bias <= kLargest, "a logit_bias value", "a number or -inf", bias);
    }
    for (int32_t token_id : params.stop_token_ids) require_token(token_id, "stop_token_ids", limits.vocab_size);
}

}  // namespace

void check_limits(const Limits& limits) {
    const std::pair<const char*, int64_t> members[] = {{"max_running_sequences", limits.max_running_sequences},
                                                       {"max_step_tokens", limits.max_step_tokens},
                                                       {"max_seq_len", limits.max_seq_len},
                                                       {"max_logits_rows", limits.max_logits_rows},
                                                       {"vocab_size", limits.vocab_size}};
    for (const auto& [name, value] : members)
        if (value < 1 || value > std::numeric_limits<int32_t>::max())
            throw CapacityError(std::string(name) + " must be between 1 and 2^31 - 1, got " + std::to_string(value));
    if (limits.final_softcap && !(std::isfinite(*limits.final_softcap) && *limits.final_softcap > 0))
        throw BackendError("the final soft cap must be positive and finite, got " +
                           std::to_string(*limits.final_softcap));
}

void check_request(const Request& request, const Limits& limits) {
    const auto num_prompt = static_cast<int64_t>(request.token_ids.size());
    if (num_prompt == 0) throw RequestError("the prompt is empty: at least one token (usually BOS) is needed");
    if (num_prompt > limits.max_seq_len)
        throw RequestError("the prompt has " + std::to_string(num_prompt) + " tokens, but a sequence can have " +
                           std::to_string(limits.max_seq_len) + "; shorten it or raise max_seq_len");
    for (int32_t token_id : request.token_ids) require_token(token_id, "the prompt", limits.vocab_size);
    check_sampling(request.sampling, limits);
    for (const auto& [name, count] : {std::pair{"num_logprobs", request.num_logprobs},
                                      std::pair{"num_prompt_logprobs", request.num_prompt_logprobs}})
        if (count)
            require(*count >= 0 && *count <= limits.vocab_size, name, "between 0 and the vocabulary's size, or absent",
                    static_cast<double>(*count));
    if (request.logits_out) {
        const auto expected = static_cast<std::size_t>(num_prompt) * static_cast<std::size_t>(limits.vocab_size);
        if (request.logits_out->size() != expected)
            throw RequestError("logits_out holds " + std::to_string(request.logits_out->size()) + " floats, but " +
                               std::to_string(num_prompt) + " prompt tokens and a vocabulary of " +
                               std::to_string(limits.vocab_size) + " need " + std::to_string(expected));
    }
}

}  // namespace gemma2_fast
