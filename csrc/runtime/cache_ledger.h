#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "runtime/block_pool.h"
#include "runtime/cache_plan.h"
#include "runtime/sequence.h"

namespace gemma2_fast {

// Who holds which pages and slots. Grows and shrinks the block tables of sequences; decides nothing.
class CacheLedger {
  public:
    explicit CacheLedger(CachePlan plan);

    // Throws CapacityError when the sequence could not reach its last token with the whole cache to itself.
    void check_fits(const Sequence& sequence) const;

    void open(Sequence& sequence);            // empty tables, and a state slot if the model has recurrent layers
    void close(Sequence& sequence);           // everything back; nothing is computed any more
    void release_unseen(Sequence& sequence);  // pages that no coming query can see

    // Pages still to be taken, in each group, before every known token of the sequence is computed.
    void add_outstanding(const Sequence& sequence, std::vector<int64_t>& blocks) const;
    bool has_free(const std::vector<int64_t>& blocks) const;

    // Tokens the sequence can append now: what free pages and its ring have room for.
    int64_t num_appendable(const Sequence& sequence) const;
    void append(Sequence& sequence, int64_t num_tokens);  // takes pages; num_tokens <= num_appendable

    const CachePlan& plan() const { return plan_; }
    std::optional<int64_t> num_slots() const;  // of sequences
    const BlockPool& pool(std::size_t group) const { return pools_[group]; }
    int64_t peak_held(std::size_t group) const { return peak_held_[group]; }  // by any one sequence

  private:
    void give_back_until(Sequence& sequence, std::size_t group, int64_t end_block);
    int64_t blocks_needed(const PagedKvGroup& group, int64_t num_tokens) const;

    CachePlan plan_;
    std::vector<BlockPool> pools_;
    std::optional<BlockPool> slots_;
    std::vector<int64_t> peak_held_;
};

}  // namespace gemma2_fast
