#include "runtime/cache_plan.h"

#include <algorithm>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {

CachePlace place_in_cache(const CachePlan& plan, int32_t layer, int64_t num_kv_heads, int64_t head_dim,
                          std::optional<int64_t> window_keys) {
    for (std::size_t index = 0; index < plan.paged.size(); ++index) {
        const PagedKvGroup& group = plan.paged[index];
        const auto found = std::find(group.layers.begin(), group.layers.end(), layer);
        if (found == group.layers.end()) continue;
        if (group.num_kv_heads != num_kv_heads || group.head_dim != head_dim || group.window_keys != window_keys ||
            group.num_blocks <= 0 || group.table_width <= 0)
            throw Error("layer " + std::to_string(layer) +
                        ": the cache group has other kv heads, another head_dim or another window, or no room");
        return {index, found - group.layers.begin()};
    }
    throw Error("cache plan: layer " + std::to_string(layer) + " has no group");
}

int64_t place_in_states(const CachePlan& plan, int32_t layer, int64_t width, int64_t conv_tail) {
    const std::string where = "layer " + std::to_string(layer) + ": ";
    if (!plan.recurrent) throw Error(where + "the cache has no states for recurrent layers");
    const RecurrentStateGroup& group = *plan.recurrent;
    const auto found = std::find(group.layers.begin(), group.layers.end(), layer);
    if (found == group.layers.end() || group.width != width || group.conv_tail != conv_tail ||
        group.num_snapshots < 0 || group.num_slots <= group.num_snapshots)
        throw Error(where + "the cache's states are of other layers, another width or convolution, or there are none");
    return found - group.layers.begin();
}

}  // namespace gemma2_fast
