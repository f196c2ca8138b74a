#include "spec/model_spec.h"

#include <cmath>

#include "base/errors.h"

namespace gemma2_fast {

void check_spec(const AttentionSpec& spec, const std::string& layer) {
    const auto require = [&](bool holds, const char* what) {
        if (!holds) throw Error(layer + what);
    };
    require(spec.num_query_heads > 0 && spec.num_kv_heads > 0 && spec.head_dim > 0 &&
                spec.num_query_heads % spec.num_kv_heads == 0,
            "query heads must be a multiple of kv heads, and both and head_dim positive");
    require(2 * static_cast<int64_t>(spec.rope.inverse_frequencies.size()) <= spec.head_dim,
            "RoPE turns more dims than a head has");
    require(!spec.window_keys || *spec.window_keys > 0, "the window must hold at least one key");
    require(!spec.score_softcap || (std::isfinite(*spec.score_softcap) && *spec.score_softcap > 0),
            "the score soft cap must be positive and finite");
}

}  // namespace gemma2_fast
