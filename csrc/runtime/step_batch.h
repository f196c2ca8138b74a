#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace gemma2_fast {

inline constexpr int32_t kNoBlock = -1;  // fills block-table entries that no visible key lives in; never read

// Stands for a token id that the host does not know yet: the one chosen in a row of the step before.
inline int32_t chosen_in_row(int64_t row) { return static_cast<int32_t>(-1 - row); }
inline int64_t row_of_chosen(int32_t token_id) { return -1 - int64_t{token_id}; }  // negative for a token id

using StateCopy = std::array<int32_t, 2>;  // state slots: from, to

// One step's work: S sequences with T new tokens in all, flat. Same fields as gemma2_fast.engine.step_batch.
struct StepBatch {
    std::vector<int32_t> token_ids;                 // [T], or chosen_in_row
    std::vector<int32_t> positions;                 // [T], consecutive within a sequence, from context_tokens[s]
    std::vector<int32_t> first_token;               // [S + 1], offsets of each sequence's tokens in token_ids
    std::vector<int32_t> context_tokens;            // [S], tokens of the sequence already in the cache
    std::vector<std::vector<int32_t>> block_table;  // per paged group: [S, table_width]
    std::vector<int32_t> state_slot;                // [S], or empty when the model has no recurrent state
    // Carried out in order before any token is computed: a copy from a sequence's slot keeps its state as it was before
    // this step, a copy to it lets the sequence go on from another state, that of its first context_tokens tokens.
    std::vector<StateCopy> state_copies;
    std::vector<int32_t> logits_token;  // [L], ascending indices into token_ids whose logits are wanted

    int64_t num_tokens() const { return static_cast<int64_t>(token_ids.size()); }
    int64_t num_sequences() const { return static_cast<int64_t>(context_tokens.size()); }
    int64_t num_logits() const { return static_cast<int64_t>(logits_token.size()); }
};

}  // namespace gemma2_fast
