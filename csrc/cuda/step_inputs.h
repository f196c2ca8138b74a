#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/arena.h"
#include "cuda/launch_sizes.h"
#include "runtime/cache_plan.h"
#include "runtime/model_step.h"

namespace gemma2_fast {

// The first sequences of a step, whose keys attention splits among programs. The queries of the others lie in tiles.
struct SplitSequences {
    int64_t number = 0;
    int64_t queries = 0;  // the most of one
    int64_t keys = 0;     // an upper bound of one's

    auto operator<=>(const SplitSequences&) const = default;
};

// Sizes that a step's launches depend on. Steps of one shape differ in nothing but what lies in memory.
struct StepShape {
    int64_t num_tokens = 0;
    int64_t num_sequences = 0;
    int64_t num_logits = 0;
    SplitSequences split;
    int64_t num_tiles = 0;   // of prefill attention
    bool is_decode = false;  // every sequence has one new token, and its logits are wanted
    bool chooses = false;    // tokens, on the device

    auto operator<=>(const StepShape&) const = default;
};

// A step's integers, filled in on the host and copied to the device as one block. There are two blocks on the host, so
// that a step can be filled in while the one before is not done.
class StepInputs {
  public:
    StepInputs(const Device& device, const CachePlan& plan, const StepSizes& sizes, int64_t vocab_size,
               const QueryRoom& room, Arena& arena);

    // Decode steps are filled up to a power of two, so that few shapes exist. What is added reads and writes a page
    // that no sequence owns, and has no queries in attention.
    StepShape shape(const StepBatch& batch, bool chooses) const;
    // choices: [L] where the shape says that tokens are chosen.
    void fill(const StepBatch& batch, std::span<const TokenChoice> choices, const StepShape& shape, int side);
    void copy(const StepShape& shape, int side, const Arena& arena, Stream& stream) const;

    // Where the device finds the arrays of a step of this shape.
    struct Addresses {
        CUdeviceptr token_ids, positions, token_sequence;  // [T]
        CUdeviceptr first_token, context_tokens;           // [S + 1], [S]
        CUdeviceptr state_slot;                            // [S]
        CUdeviceptr logits_token;                          // [L]
        CUdeviceptr tiles;                                 // [tiles, 2]
        // Of choices: [L], the seed of 64 bits, token_index a number and the others as in SamplingParams.
        CUdeviceptr temperature, top_k, top_p, min_p, seed, token_index;
        std::vector<CUdeviceptr> block_table;  // a paged group: [S, table_width]
    };
    Addresses addresses(const StepShape& shape, const Arena& arena) const;

  private:
    // Offsets of the same arrays in the block, in integers.
    struct Layout {
        int64_t token_ids, positions, token_sequence, first_token, context_tokens, state_slot, logits_token, tiles;
        int64_t temperature, top_k, top_p, min_p, seed, token_index;
        std::vector<int64_t> block_table;
        int64_t size;
    };

    Layout layout(const StepShape& shape) const;
    SplitSequences split_sequences(const StepBatch& batch) const;
    void fill_tiles(const StepBatch& batch, const StepShape& shape, int32_t* tiles) const;
    void fill_choices(std::span<const TokenChoice> choices, const StepShape& shape, int32_t* block) const;

    CachePlan plan_;
    int64_t vocab_size_;
    QueryRoom room_;
    Arena::Slice block_;
    std::array<PinnedMemory, 2> host_;
};

}  // namespace gemma2_fast
