#include "runtime/check_batch.h"

#include <algorithm>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

// Every page that a query may read or write must exist.
void check_blocks(const StepBatch& batch, const CachePlan& plan, std::size_t group_index) {
    const PagedKvGroup& group = plan.paged[group_index];
    const std::vector<int32_t>& table = batch.block_table[group_index];
    if (static_cast<int64_t>(table.size()) != batch.num_sequences() * group.table_width)
        throw Error("block table of group " + std::to_string(group_index) + " has " + std::to_string(table.size()) +
                    " entries, expected " + std::to_string(batch.num_sequences() * group.table_width));
    for (int64_t s = 0; s < batch.num_sequences(); ++s) {
        const int64_t context = batch.context_tokens[s];
        const int64_t end = context + batch.first_token[s + 1] - batch.first_token[s];
        const int64_t oldest = group.window_keys ? std::max<int64_t>(0, context - *group.window_keys + 1) : 0;
        for (int64_t page = oldest / plan.page_tokens; page <= (end - 1) / plan.page_tokens; ++page) {
            const int32_t block = table[s * group.table_width + page % group.table_width];
            if (block < 0 || block >= group.num_blocks)
                throw Error("page " + std::to_string(page) + " of sequence " + std::to_string(s) + " in group " +
                            std::to_string(group_index) + " has no block");
        }
    }
}

void check_state_slots(const StepBatch& batch, const RecurrentStateGroup& group) {
    std::vector<int32_t> slots = batch.state_slot;
    std::ranges::sort(slots);
    if (static_cast<int64_t>(slots.size()) != batch.num_sequences() || std::ranges::adjacent_find(slots) != slots.end())
        throw Error("the batch has " + std::to_string(slots.size()) +
                    " state slots, expected one of its own for each of " + std::to_string(batch.num_sequences()) +
                    " sequences");
    const int64_t num_slots = group.num_slots - group.num_snapshots;
    if (!slots.empty() && (slots.front() < 0 || slots.back() >= num_slots))
        throw Error("the batch's state slots lie in " + std::to_string(slots.front()) + ".." +
                    std::to_string(slots.back()) + ", the cache has " + std::to_string(num_slots) + " for sequences");
}

void check_state_copies(const StepBatch& batch, int64_t num_slots) {
    for (const auto& [from, to] : batch.state_copies) {
        const std::string copy = "a state is copied from slot " + std::to_string(from) + " to " + std::to_string(to);
        if (from == to || std::min(from, to) < 0 || std::max(from, to) >= num_slots)
            throw Error(copy + ", expected two different ones of the cache's " + std::to_string(num_slots));
        for (int64_t s = 0; s < batch.num_sequences(); ++s)
            if (batch.state_slot[s] == to && batch.context_tokens[s] == 0)
                throw Error(copy + ", but sequence " + std::to_string(s) +
                            " of this slot begins in this step and so reads no state");
    }
}

}  // namespace

void check_batch(const StepBatch& batch, const CachePlan& plan, const StepLimits& limits, int64_t num_logit_values,
                 int64_t num_rows_before) {
    if (batch.num_tokens() < 1 || batch.num_tokens() > limits.max_step_tokens ||
        batch.num_logits() > limits.max_logits_rows)
        throw Error("step of " + std::to_string(batch.num_tokens()) + " tokens and " +
                    std::to_string(batch.num_logits()) + " logit rows, planned for 1 to " +
                    std::to_string(limits.max_step_tokens) + " and up to " + std::to_string(limits.max_logits_rows));
    if (num_logit_values != batch.num_logits() * limits.vocab_size)
        throw Error("logits have " + std::to_string(num_logit_values) + " elements, expected " +
                    std::to_string(batch.num_logits() * limits.vocab_size));
    for (int32_t token : batch.token_ids)
        if (row_of_chosen(token) >= num_rows_before)
            throw Error("a token is to be that of row " + std::to_string(row_of_chosen(token)) +
                        " of the step before, which has " + std::to_string(num_rows_before));
        else if (token >= limits.vocab_size)
            throw Error("token id " + std::to_string(token) + " is outside the vocabulary of " +
                        std::to_string(limits.vocab_size));
    if (batch.block_table.size() != plan.paged.size())
        throw Error("the batch has block tables of " + std::to_string(batch.block_table.size()) +
                    " groups, the cache " + std::to_string(plan.paged.size()));
    for (std::size_t group = 0; group < plan.paged.size(); ++group) check_blocks(batch, plan, group);
    if (plan.recurrent)
        check_state_slots(batch, *plan.recurrent);
    else if (!batch.state_slot.empty())
        throw Error("the batch has state slots, the model no recurrent layer");
    check_state_copies(batch, plan.recurrent ? plan.recurrent->num_slots : 0);
}

}  // namespace gemma2_fast
