#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "runtime/request.h"

namespace gemma2_fast {

// Pages of one group that a sequence holds: logical blocks [first_block, end_block), each in column b % table_width.
struct HeldBlocks {
    std::vector<int32_t> table;  // [table_width], kNoBlock where no visible key lives
    int64_t first_block = 0;
    int64_t end_block = 0;

    int64_t num_held() const { return end_block - first_block; }
};

enum class SequenceStatus { kWaiting, kRunning };

// A request on its way: its tokens, how many of them are in the cache, and where.
struct Sequence {
    Sequence(int64_t sequence_id, Request asked, const Limits& limits)
        : id(sequence_id), request(std::move(asked)), token_ids(request.token_ids), num_prompt(num_known()) {
        max_new_tokens = std::min(request.sampling.max_tokens, limits.max_seq_len - num_prompt);
        if (request.logits_out)
            end_prompt_rows = num_prompt;
        else if (request.num_prompt_logprobs)
            end_prompt_rows = num_prompt - 1;
    }

    int64_t id;
    Request request;
    std::vector<int32_t> token_ids;  // prompt, then generated; a last one that is still to come is chosen_in_row
    int64_t num_prompt;
    int64_t max_new_tokens = 0;
    int64_t next_prompt_row = 0;  // prompt tokens [next_prompt_row, end_prompt_rows) still owe their row of logits
    int64_t end_prompt_rows = 0;

    SequenceStatus status = SequenceStatus::kWaiting;
    int64_t computed_tokens = 0;   // in the cache
    std::vector<HeldBlocks> held;  // a paged group each
    std::optional<int32_t> state_slot;
    bool host_chooses = false;  // a row was left to the host before, so no step runs ahead of its next token

    int64_t num_known() const { return static_cast<int64_t>(token_ids.size()); }
    int64_t num_generated() const { return num_known() - num_prompt; }
    // The last token of all is never read back.
    int64_t num_uncomputed() const { return num_known() - (num_generated() > 0 && complete()) - computed_tokens; }
    bool decoding() const { return num_generated() > 0 && num_uncomputed() == 1; }
    bool complete() const { return num_generated() >= max_new_tokens; }
    bool is_last(int64_t position) const { return position + 1 - num_prompt >= max_new_tokens; }
    std::span<const int32_t> generated_ids() const { return std::span(token_ids).subspan(num_prompt); }

    bool wants_prompt_row(int64_t position) const { return position >= next_prompt_row && position < end_prompt_rows; }
    bool wants_next_token(int64_t position) const { return position + 1 == num_known() && !complete(); }
    bool wants_row(int64_t position) const { return wants_prompt_row(position) || wants_next_token(position); }
};

}  // namespace gemma2_fast
