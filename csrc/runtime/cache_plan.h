#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace gemma2_fast {

// Mirrors gemma2_fast.engine.cache_plan, which computes it and is the only place that counts bytes.
struct PagedKvGroup {
    std::vector<int32_t> layers;  // model layers whose keys and values live in this group
    int64_t num_kv_heads = 0;
    int64_t head_dim = 0;
    std::optional<int64_t> window_keys;  // query included; absent: every earlier key is visible
    int64_t num_blocks = 0;              // pages in the pool of this group
    // Columns of a sequence's block table. Logical block b = position / page_tokens stands in column b % table_width,
    // so a windowed group is a ring wide enough for its window and one step's chunk.
    int64_t table_width = 0;
};

struct RecurrentStateGroup {
    std::vector<int32_t> layers;
    int64_t width = 0;
    int64_t conv_tail = 0;  // earlier convolution inputs kept (conv_width - 1)
    int64_t num_slots = 0;
    int64_t num_snapshots = 0;  // the last of the slots, which no sequence has: states are copied there and back
};

struct CachePlan {
    int64_t page_tokens = 0;  // P, the same for every group
    std::vector<PagedKvGroup> paged;
    std::optional<RecurrentStateGroup> recurrent;
};

struct CachePlace {
    std::size_t group_index = 0;  // into CachePlan::paged
    int64_t group_layer = 0;      // the layer's place in that group
};

// Where an attention layer's keys and values live. Throws Error where the plan has no such layer, or one that differs.
CachePlace place_in_cache(const CachePlan& plan, int32_t layer, int64_t num_kv_heads, int64_t head_dim,
                          std::optional<int64_t> window_keys);

// The same for a recurrent layer: its place among those that have states.
int64_t place_in_states(const CachePlan& plan, int32_t layer, int64_t width, int64_t conv_tail);

}  // namespace gemma2_fast
