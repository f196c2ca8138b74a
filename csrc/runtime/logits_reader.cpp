#include "runtime/logits_reader.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

namespace gemma2_fast {
namespace {

int64_t now_ns() { return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Of the generated token at a position. Later ones may already stand behind it, without their ids.
void tell(const Sequence& sequence, int64_t position, TokenEvent& event) {
    event.token_id = sequence.token_ids[position];
    const auto& stops = sequence.request.sampling.stop_token_ids;
    if (std::ranges::find(stops, *event.token_id) != stops.end())
        event.finish_reason = FinishReason::kStop;
    else if (sequence.is_last(position))
        event.finish_reason = FinishReason::kLength;
}

// None: a chunk up to end_position told nothing. A request for no tokens ends with its prompt.
std::optional<TokenEvent> sent(const Sequence& sequence, int64_t end_position, TokenEvent event) {
    if (!event.finish_reason && sequence.max_new_tokens <= 0 && end_position >= sequence.num_prompt)
        event.finish_reason = FinishReason::kLength;
    if (!event.token_id && event.prompt_logprobs.empty() && !event.finish_reason) return std::nullopt;
    event.time_ns = now_ns();
    return event;
}

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
        read_row(sequence, position, logits.subspan(row++ * vocab_size_, vocab_size_), event);
        if (event.finish_reason == FinishReason::kError) return event;
    }
    sequence.computed_tokens = end_position;
    return sent(sequence, end_position, std::move(event));
}

void LogitsReader::read_row(Sequence& sequence, int64_t position, std::span<const float> values, TokenEvent& event) {
    if (!sampler_.scan(values)) {
        event = last_event(sequence.id, FinishReason::kError,
                           "the logits after token " + std::to_string(position) +
                               " hold NaN or +inf, or nothing above -inf: the weights or the cache are damaged");
        return;
    }
    const bool next = sequence.wants_next_token(position);
    if (sequence.wants_prompt_row(position)) read_prompt_row(sequence, event);
    if (next) read_next_token(sequence, event);
}

bool LogitsReader::needs_only_a_choice(const Sequence& sequence) {
    const SamplingParams& params = sequence.request.sampling;
    const bool plain = params.logit_bias.empty() && params.repetition_penalty == 1 && params.presence_penalty == 0 &&
                       params.frequency_penalty == 0 && sequence.num_generated() >= params.min_tokens;
    const bool wants_prompt = sequence.next_prompt_row < sequence.end_prompt_rows;
    return plain && !wants_prompt && !sequence.request.num_logprobs;
}

void LogitsReader::advance(const Chunk& chunk) {
    chunk.sequence->computed_tokens += chunk.num_tokens;
    if (chunk.num_rows > 0) chunk.sequence->token_ids.push_back(chosen_in_row(chunk.first_row));
}

std::optional<TokenEvent> LogitsReader::settle(Sequence& sequence, int64_t end_position,
                                               std::optional<int32_t> token_id) {
    TokenEvent event;
    event.sequence_id = sequence.id;
    if (token_id) {
        sequence.token_ids[end_position] = *token_id;
        tell(sequence, end_position, event);
    }
    return sent(sequence, end_position, std::move(event));
}

std::optional<TokenEvent> LogitsReader::settle_by_logits(Sequence& sequence, std::span<const float> values) {
    TokenEvent event;
    event.sequence_id = sequence.id;
    sequence.token_ids.pop_back();
    const int64_t end_position = sequence.num_known();
    read_row(sequence, end_position - 1, values, event);
    return sent(sequence, end_position, std::move(event));
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
    sequence.token_ids.push_back(*token_id);
    tell(sequence, sequence.num_known() - 1, event);
}

}  // namespace gemma2_fast
