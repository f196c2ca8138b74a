#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cuda/device_weights.h"
#include "cuda/launch_sizes.h"
#include "cuda/product.h"
#include "cuda/step_context.h"
#include "spec/model_spec.h"

namespace gemma2_fast {

// cos and sin of every position and pair, [max_seq_len, pairs] float32.
struct RopeTables {
    Arena::Slice cos, sin;
};

// Scratch of attention whose keys are split among programs, and which layers share, because they run one after another.
struct SplitScratch {
    Arena::Slice parts, part_sums, arrivals;
    int64_t num_programs = 0;

    // rows: query heads of a sequence and kv head that a program has room for.
    static SplitScratch reserve(Arena& arena, int64_t most_sequences, int64_t most_kv_heads, int64_t rows,
                                int64_t widest_head, int64_t num_multiprocessors);
};

// The mixer of an attention layer: from normed rows to the branch that is added to the residual.
class AttentionLayer {
  public:
    AttentionLayer(const AttentionSpec& spec, const std::string& prefix, int64_t model_width, int64_t page_tokens,
                   int64_t most_tokens, KernelSet& kernels, DeviceWeights& weights);

    // pages: of this layer, [N, 2, K, P, D] bfloat16, and one more than the plan has, which is nobody's.
    void join(std::size_t group_index, int64_t table_width, Arena::Slice pages, RopeTables rope);
    void enqueue(const StepContext& step, const SplitScratch& scratch, float norm_epsilon) const;

    const AttentionSpec& spec() const { return spec_; }
    QueryRoom query_room() const;
    int64_t decode_rows() const { return decode_.back()->constant("ROWS"); }  // of a program with most of them
    int64_t mixed_width() const { return qkv_.matrix().rows; }
    int64_t attended_width() const { return output_.matrix().cols; }

  private:
    void rotate_and_store(const StepContext& step, float norm_epsilon) const;
    void attend(const StepContext& step, const SplitScratch& scratch) const;
    const Kernel& decode_kernel(int64_t num_queries) const;
    int64_t num_splits(const SplitSequences& split, const SplitScratch& scratch) const;

    AttentionSpec spec_;
    Product qkv_, output_;  // rows of queries, then keys, then values
    std::optional<Arena::Slice> query_gain_, key_gain_;
    const Kernel *rope_, *prefill_;
    std::vector<const Kernel*> decode_;  // the same with room for more and more rows
    std::size_t group_index_ = 0;
    int64_t table_width_ = 0;
    Arena::Slice pages_;
    RopeTables rope_tables_;
};

}  // namespace gemma2_fast
