#include "runtime/cache_ledger.h"

#include <algorithm>
#include <limits>
#include <string>

#include "base/errors.h"
#include "runtime/step_batch.h"

namespace gemma2_fast {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

CacheLedger::CacheLedger(CachePlan plan) : plan_(std::move(plan)) {
    if (plan_.page_tokens < 1)
        throw CapacityError("a cache page needs at least 1 token, got " + std::to_string(plan_.page_tokens));
    for (const PagedKvGroup& group : plan_.paged) {
        if (group.table_width < 1 || (group.window_keys && *group.window_keys < 1))
            throw CapacityError("a paged cache group needs a table_width and a window of at least 1, got " +
                                std::to_string(group.table_width) + " and " +
                                (group.window_keys ? std::to_string(*group.window_keys) : "no window"));
        pools_.emplace_back(group.num_blocks);
    }
    if (plan_.recurrent) slots_.emplace(plan_.recurrent->num_slots - plan_.recurrent->num_snapshots);
    peak_held_.assign(pools_.size(), 0);
}

// Pages held at once while the last of num_tokens is computed in steps as small as one token.
int64_t CacheLedger::blocks_needed(const PagedKvGroup& group, int64_t num_tokens) const {
    const int64_t whole = ceil_div(num_tokens, plan_.page_tokens);
    if (!group.window_keys) return whole;
    return std::min(whole, ceil_div(*group.window_keys - 1, plan_.page_tokens) + 1);
}

void CacheLedger::check_fits(const Sequence& sequence) const {
    // The last generated token is never read back, so it needs no place.
    const int64_t num_tokens = sequence.num_prompt + std::max<int64_t>(sequence.max_new_tokens - 1, 0);
    for (const PagedKvGroup& group : plan_.paged) {
        const int64_t needed = blocks_needed(group, num_tokens);
        const int64_t there = std::min(group.num_blocks, group.table_width);
        if (needed > there)
            throw CapacityError("the request needs " + std::to_string(num_tokens) + " tokens in the cache (" +
                                std::to_string(sequence.num_prompt) + " of the prompt), which is " +
                                std::to_string(needed) + " blocks of " + std::to_string(plan_.page_tokens) +
                                " tokens, but one sequence can have " + std::to_string(there) +
                                "; shorten the prompt, lower max_tokens or give the cache more memory");
    }
}

void CacheLedger::open(Sequence& sequence) {
    if (slots_) sequence.state_slot = slots_->take(sequence.id);
    sequence.held.resize(plan_.paged.size());
    for (std::size_t g = 0; g < plan_.paged.size(); ++g)
        sequence.held[g] = HeldBlocks{std::vector<int32_t>(plan_.paged[g].table_width, kNoBlock), 0, 0};
}

void CacheLedger::close(Sequence& sequence) {
    for (std::size_t g = 0; g < sequence.held.size(); ++g) give_back_until(sequence, g, sequence.held[g].end_block);
    sequence.held.clear();
    if (sequence.state_slot) slots_->give_back(*sequence.state_slot, sequence.id);
    sequence.state_slot.reset();
    sequence.computed_tokens = 0;
}

void CacheLedger::release_unseen(Sequence& sequence) {
    for (std::size_t g = 0; g < sequence.held.size(); ++g) {
        if (!plan_.paged[g].window_keys) continue;
        const int64_t first_visible = sequence.computed_tokens - *plan_.paged[g].window_keys + 1;
        if (first_visible > 0)
            give_back_until(sequence, g, std::min(first_visible / plan_.page_tokens, sequence.held[g].end_block));
    }
}

void CacheLedger::give_back_until(Sequence& sequence, std::size_t group, int64_t end_block) {
    HeldBlocks& held = sequence.held[group];
    for (; held.first_block < end_block; ++held.first_block) {
        int32_t& entry = held.table[held.first_block % plan_.paged[group].table_width];
        pools_[group].give_back(entry, sequence.id);
        entry = kNoBlock;
    }
}

void CacheLedger::add_outstanding(const Sequence& sequence, std::vector<int64_t>& blocks) const {
    blocks.resize(plan_.paged.size());
    for (std::size_t g = 0; g < plan_.paged.size(); ++g) {
        const int64_t num_held = sequence.held.empty() ? 0 : sequence.held[g].num_held();
        blocks[g] += std::max<int64_t>(blocks_needed(plan_.paged[g], sequence.num_known()) - num_held, 0);
    }
}

bool CacheLedger::has_free(const std::vector<int64_t>& blocks) const {
    for (std::size_t g = 0; g < blocks.size(); ++g)
        if (blocks[g] > pools_[g].num_free()) return false;
    return true;
}

int64_t CacheLedger::num_appendable(const Sequence& sequence) const {
    int64_t end_position = std::numeric_limits<int64_t>::max();
    for (std::size_t g = 0; g < sequence.held.size(); ++g) {
        const HeldBlocks& held = sequence.held[g];
        const int64_t end_block =
            std::min(held.first_block + plan_.paged[g].table_width, held.end_block + pools_[g].num_free());
        end_position = std::min(end_position, end_block * plan_.page_tokens);
    }
    return end_position - sequence.computed_tokens;
}

void CacheLedger::append(Sequence& sequence, int64_t num_tokens) {
    const int64_t end_block = ceil_div(sequence.computed_tokens + num_tokens, plan_.page_tokens);
    for (std::size_t g = 0; g < sequence.held.size(); ++g) {
        HeldBlocks& held = sequence.held[g];
        for (; held.end_block < end_block; ++held.end_block)
            held.table[held.end_block % plan_.paged[g].table_width] = pools_[g].take(sequence.id);
        peak_held_[g] = std::max(peak_held_[g], held.num_held());
    }
}

std::optional<int64_t> CacheLedger::num_slots() const {
    if (!slots_) return std::nullopt;
    return slots_->num_blocks();
}

}  // namespace gemma2_fast
