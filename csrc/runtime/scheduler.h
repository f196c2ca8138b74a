#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "base/function_ref.h"
#include "runtime/cache_ledger.h"
#include "runtime/sequence.h"
#include "runtime/step_batch.h"

namespace gemma2_fast {

// One sequence's part of a step: its next num_tokens tokens, and its rows of the step's logits.
struct Chunk {
    Sequence* sequence = nullptr;
    int64_t num_tokens = 0;
    int64_t first_row = 0;
    int64_t num_rows = 0;
};

// Continuous batching with chunked prefill over one token budget. First come, first served: the running sequences are
// always older than the waiting ones, an older one may take the blocks of a younger one, never the other way round, and
// whatever is admitted fits the cache alone. So the oldest advances in every step, or waits for its last token alone,
// and every sequence becomes the oldest.
class Scheduler {
  public:
    Scheduler(CachePlan plan, const Limits& limits);

    void add(std::unique_ptr<Sequence> sequence);           // ids ascend in order of arrival
    std::unique_ptr<Sequence> remove(int64_t sequence_id);  // its blocks are free at once; null: not here
    std::unique_ptr<Sequence> remove_any();                 // null: none is left
    Sequence* find(int64_t sequence_id) const;              // null: not here
    void restart(Sequence& sequence);                       // what is known of it is to be computed from its beginning

    // Chooses the next step. The chunks, in the batch's order, and the batch live until the next call. There is none
    // only if a sequence waits for its last token, and no other can advance before that. Whoever runs the step adds
    // num_tokens to each sequence's computed_tokens.
    std::span<const Chunk> schedule();
    const StepBatch& batch() const { return batch_; }

    bool has_work() const { return !running_.empty() || !waiting_.empty(); }
    bool all_of(FunctionRef<bool(const Sequence&)> holds) const;
    int64_t num_running() const { return static_cast<int64_t>(running_.size()); }
    int64_t num_waiting() const { return static_cast<int64_t>(waiting_.size()); }
    int64_t num_preemptions() const { return num_preemptions_; }
    const CacheLedger& cache() const { return cache_; }

  private:
    void schedule_chunk(Sequence& sequence);
    int64_t num_affordable(const Sequence& sequence) const;
    bool next_can_be_admitted() const;
    void admit_next();
    void preempt_latest();
    void build_batch();

    CacheLedger cache_;
    Limits limits_;
    int64_t max_running_;
    std::vector<std::unique_ptr<Sequence>> running_;  // oldest first
    std::deque<std::unique_ptr<Sequence>> waiting_;   // oldest first
    int64_t num_preemptions_ = 0;

    int64_t tokens_left_ = 0;
    int64_t rows_left_ = 0;
    std::vector<Chunk> chunks_;
    StepBatch batch_;
};

}  // namespace gemma2_fast
