#include "runtime/logits_reader.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

namespace gemma2_fast {
namespace {

int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

}  // namespace

TokenEvent last_event(int64_t sequence_id, FinishReason reason, std::string message) {
    TokenEvent event;
    event.sequence_id = sequence_id;
    event.finish_reason = reason;
    event.message = std::move(message);
    event.time_ns = now_ns();
    return event;
}

std::optional<TokenEvent> LogitsReader::read(const Chunk& chunk, std::span<const float> logits) {
    Sequence& sequence = *chunk.sequence;
    TokenEvent event;
    event.sequence_id = sequence.id;
    int64_t row = chunk.first_row;
    const int64_t end_position = sequence.computed_tokens + chunk.num_tokens;
    for (int64_t position = sequence.computed_tokens; position < end_position; ++position) {
        if (!sequence.wants_row(position)) continue;
        const std::span<const float> values = logits.subspan(row++ * vocab_size_, vocab_size_);
        if (!sampler_.scan(values))
            return last_event(sequence.id, FinishReason::kError,
                              "the logits after token " + std::to_string(position) +
                                  " hold NaN or +inf, or nothing above -inf: the weights or the cache are damaged");
        const bool next = sequence.wants_next_token(position);
        if (sequence.wants_prompt_row(position)) read_prompt_row(sequence, event);
        if (next) read_next_token(sequence, event);
        if (event.finish_reason == FinishReason::kError) return event;
    }
    return finished(sequence, end_position, std::move(event));
}

bool LogitsReader::needs_only_a_choice(const Chunk& chunk) {
    const Sequence& sequence = *chunk.sequence;
    const SamplingParams& params = sequence.request.sampling;
    const bool plain = params.logit_bias.empty() && params.repetition_penalty == 1 && params.presence_penalty == 0 &&
                       params.frequency_penalty == 0 && sequence.num_generated() >= params.min_tokens;
    const bool wants_prompt = sequence.next_prompt_row < sequence.end_prompt_rows;
    return plain && !wants_prompt && !sequence.request.num_logprobs;
}

std::optional<TokenEvent> LogitsReader::accept(const Chunk& chunk, std::optional<int32_t> token_id) {
    Sequence& sequence = *chunk.sequence;
    TokenEvent event;
    event.sequence_id = sequence.id;
    const int64_t end_position = sequence.computed_tokens + chunk.num_tokens;
    if (token_id) append(sequence, *token_id, event);
    return finished(sequence, end_position, std::move(event));
}

std::optional<TokenEvent> LogitsReader::finished(Sequence& sequence, int64_t end_position, TokenEvent event) {
    sequence.computed_tokens = end_position;
    if (!event.finish_reason && sequence.complete() && sequence.computed_tokens >= sequence.num_prompt)
        event.finish_reason = FinishReason::kLength;
    if (!event.token_id && event.prompt_logprobs.empty() && !event.finish_reason) return std::nullopt;
    event.time_ns = now_ns();
    return event;
}

void LogitsReader::read_prompt_row(Sequence& sequence, TokenEvent& event) {
    const int64_t position = sequence.next_prompt_row++;
    if (sequence.request.logits_out)
        sampler_.copy_values(sequence.request.logits_out->subspan(position * vocab_size_, vocab_size_));
    if (sequence.request.num_prompt_logprobs && position + 1 < sequence.num_prompt)
        event.prompt_logprobs.push_back(
            sampler_.logprob(sequence.token_ids[position + 1], *sequence.request.num_prompt_logprobs));
}

void LogitsReader::read_next_token(Sequence& sequence, TokenEvent& event) {
    const std::optional<int32_t> token_id = sampler_.choose(sequence);
    if (!token_id) {
        event = last_event(sequence.id, FinishReason::kError,
                           "logit bias, penalties and masked stop tokens left no token that could be chosen");
        return;
    }
    if (sequence.request.num_logprobs) event.logprob = sampler_.logprob(*token_id, *sequence.request.num_logprobs);
    append(sequence, *token_id, event);
}

void LogitsReader::append(Sequence& sequence, int32_t token_id, TokenEvent& event) {
    sequence.token_ids.push_back(token_id);
    event.token_id = token_id;
    const auto& stops = sequence.request.sampling.stop_token_ids;
    if (std::ranges::find(stops, token_id) != stops.end())
        event.finish_reason = FinishReason::kStop;
    else if (sequence.complete())
        event.finish_reason = FinishReason::kLength;
}

}  // namespace gemma2_fast
