#include "spec/model_spec.h"

#include <cmath>

#include "base/errors.h"

namespace gemma2_fast {

namespace {

void require(bool holds, const std::string& layer, const char* what) {
    if (!holds) throw Error(layer + what);
}

}  // namespace

void check_spec(const AttentionSpec& spec, const std::string& layer) {
    require(spec.num_query_heads > 0 && spec.num_kv_heads > 0 && spec.head_dim > 0 &&
                spec.num_query_heads % spec.num_kv_heads == 0,
            layer, "query heads must be a multiple of kv heads, and both and head_dim positive");
    require(2 * static_cast<int64_t>(spec.rope.inverse_frequencies.size()) <= spec.head_dim, layer,
            "RoPE turns more dims than a head has");
    require(!spec.window_keys || *spec.window_keys > 0, layer, "the window must hold at least one key");
    require(!spec.score_softcap || (std::isfinite(*spec.score_softcap) && *spec.score_softcap > 0), layer,
            "the score soft cap must be positive and finite");
}

void check_spec(const RecurrentSpec& spec, const std::string& layer) {
    require(spec.width > 0 && spec.num_gate_blocks > 0 && spec.width % spec.num_gate_blocks == 0, layer,
            "the width must be a positive multiple of the gate blocks");
    require(spec.conv_width > 0, layer, "the convolution must have a tap");
}

}  // namespace gemma2_fast
