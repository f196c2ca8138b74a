#include "runtime/scheduler.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <utility>

namespace gemma2_fast {

Scheduler::Scheduler(CachePlan plan, const Limits& limits) : cache_(std::move(plan)), limits_(limits) {
    check_limits(limits);
    // A running sequence must be able to get a token and a row in every step, or a younger one could starve an older.
    max_running_ = std::min({limits.max_running_sequences, limits.max_step_tokens, limits.max_logits_rows,
                             cache_.num_slots().value_or(limits.max_running_sequences)});
}

void Scheduler::add(std::unique_ptr<Sequence> sequence) { waiting_.push_back(std::move(sequence)); }

std::unique_ptr<Sequence> Scheduler::remove(int64_t sequence_id) {
    std::unique_ptr<Sequence> removed;
    const auto is_it = [&](const std::unique_ptr<Sequence>& sequence) { return sequence->id == sequence_id; };
    if (const auto it = std::ranges::find_if(running_, is_it); it != running_.end()) {
        removed = std::move(*it);
        running_.erase(it);
        cache_.close(*removed);
    } else if (const auto it = std::ranges::find_if(waiting_, is_it); it != waiting_.end()) {
        removed = std::move(*it);
        waiting_.erase(it);
    }
    return removed;
}

std::unique_ptr<Sequence> Scheduler::remove_any() {
    if (!running_.empty()) return remove(running_.back()->id);
    if (!waiting_.empty()) return remove(waiting_.back()->id);
    return nullptr;
}

Sequence* Scheduler::find(int64_t sequence_id) const {
    const auto is_it = [&](const std::unique_ptr<Sequence>& sequence) { return sequence->id == sequence_id; };
    if (const auto it = std::ranges::find_if(running_, is_it); it != running_.end()) return it->get();
    if (const auto it = std::ranges::find_if(waiting_, is_it); it != waiting_.end()) return it->get();
    return nullptr;
}

void Scheduler::restart(Sequence& sequence) {
    if (sequence.status != SequenceStatus::kRunning) return;
    cache_.close(sequence);
    cache_.open(sequence);
}

bool Scheduler::all_of(FunctionRef<bool(const Sequence&)> holds) const {
    const auto it_holds = [&](const std::unique_ptr<Sequence>& sequence) { return holds(*sequence); };
    return std::ranges::all_of(running_, it_holds) && std::ranges::all_of(waiting_, it_holds);
}

std::span<const Chunk> Scheduler::schedule() {
    chunks_.clear();
    tokens_left_ = limits_.max_step_tokens;
    rows_left_ = limits_.max_logits_rows;
    const int64_t preemptions_before = num_preemptions_;

    for (const auto& sequence : running_) cache_.release_unseen(*sequence);
    // By index: scheduling one sequence can preempt those behind it.
    for (std::size_t i = 0; i < running_.size(); ++i)
        if (running_[i]->decoding()) schedule_chunk(*running_[i]);
    for (std::size_t i = 0; i < running_.size(); ++i)
        if (!running_[i]->decoding()) schedule_chunk(*running_[i]);
    if (num_preemptions_ == preemptions_before)  // else the victim would be back at once, and out again soon
        while (next_can_be_admitted()) {
            admit_next();
            schedule_chunk(*running_.back());
        }

    const auto waits_for_its_last = [](const auto& sequence) { return sequence->num_uncomputed() == 0; };
    if (chunks_.empty() && has_work() && std::ranges::none_of(running_, waits_for_its_last))
        throw std::logic_error("the scheduler found no token to compute");
    build_batch();
    return chunks_;
}

void Scheduler::schedule_chunk(Sequence& sequence) {
    int64_t num_tokens = num_affordable(sequence);
    if (num_tokens == 0) return;
    while (cache_.num_appendable(sequence) == 0) {
        if (running_.back().get() == &sequence) return;  // the youngest waits for the others' blocks
        preempt_latest();
    }
    num_tokens = std::min(num_tokens, cache_.num_appendable(sequence));
    cache_.append(sequence, num_tokens);

    Chunk chunk{&sequence, num_tokens, 0, 0};
    for (int64_t i = 0; i < num_tokens; ++i) chunk.num_rows += sequence.wants_row(sequence.computed_tokens + i);
    tokens_left_ -= chunk.num_tokens;
    rows_left_ -= chunk.num_rows;
    chunks_.push_back(chunk);
}

// Tokens that what is left of the step's tokens and rows of logits pays for.
int64_t Scheduler::num_affordable(const Sequence& sequence) const {
    const int64_t most = std::min(sequence.num_uncomputed(), tokens_left_);
    int64_t rows_left = rows_left_;
    for (int64_t i = 0; i < most; ++i)
        if (sequence.wants_row(sequence.computed_tokens + i) && rows_left-- == 0) return i;
    return most;
}

bool Scheduler::next_can_be_admitted() const {
    if (waiting_.empty() || num_running() >= max_running_ || tokens_left_ == 0) return false;
    std::vector<int64_t> blocks;
    cache_.add_outstanding(*waiting_.front(), blocks);
    for (const auto& sequence : running_) cache_.add_outstanding(*sequence, blocks);
    return cache_.has_free(blocks);
}

void Scheduler::admit_next() {
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
    running_.back()->status = SequenceStatus::kRunning;
    cache_.open(*running_.back());
}

void Scheduler::preempt_latest() {
    std::unique_ptr<Sequence> victim = std::move(running_.back());
    running_.pop_back();
    const auto chunk = std::ranges::find(chunks_, victim.get(), &Chunk::sequence);
    if (chunk != chunks_.end()) {
        tokens_left_ += chunk->num_tokens;
        rows_left_ += chunk->num_rows;
        chunks_.erase(chunk);
    }
    cache_.close(*victim);
    victim->status = SequenceStatus::kWaiting;
    waiting_.push_front(std::move(victim));
    ++num_preemptions_;
}

void Scheduler::build_batch() {
    batch_.token_ids.clear();
    batch_.positions.clear();
    batch_.first_token.assign(1, 0);
    batch_.context_tokens.clear();
    batch_.block_table.resize(cache_.plan().paged.size());
    for (auto& table : batch_.block_table) table.clear();
    batch_.state_slot.clear();
    batch_.logits_token.clear();
    for (Chunk& chunk : chunks_) {
        const Sequence& sequence = *chunk.sequence;
        chunk.first_row = batch_.num_logits();
        for (int64_t i = 0; i < chunk.num_tokens; ++i) {
            const int64_t position = sequence.computed_tokens + i;
            if (sequence.wants_row(position)) batch_.logits_token.push_back(static_cast<int32_t>(batch_.num_tokens()));
            batch_.token_ids.push_back(sequence.token_ids[position]);
            batch_.positions.push_back(static_cast<int32_t>(position));
        }
        batch_.first_token.push_back(static_cast<int32_t>(batch_.num_tokens()));
        batch_.context_tokens.push_back(static_cast<int32_t>(sequence.computed_tokens));
        for (std::size_t g = 0; g < sequence.held.size(); ++g)
            std::ranges::copy(sequence.held[g].table, std::back_inserter(batch_.block_table[g]));
        if (sequence.state_slot) batch_.state_slot.push_back(*sequence.state_slot);
    }
}

}  // namespace gemma2_fast
