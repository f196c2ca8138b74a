#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

namespace gemma2_fast {

// Mirrors gemma2_fast.spec; see there for the meaning of every field.
struct RopeSpec {
    std::vector<float> inverse_frequencies;  // [rotated_dims / 2], position_scale already folded in
    bool operator==(const RopeSpec&) const = default;
};

struct AttentionSpec {
    int64_t num_query_heads = 0;  // H
    int64_t num_kv_heads = 0;     // K
    int64_t head_dim = 0;         // D
    float query_scale = 0;
    std::optional<float> score_softcap;
    std::optional<int64_t> window_keys;
    bool qk_norm = false;
    bool output_bias = false;
    RopeSpec rope;
};

// Throws Error that begins with `layer` where numbers do not fit together: kernels trust them, whatever made the spec.
void check_spec(const AttentionSpec& spec, const std::string& layer);

struct RecurrentSpec {
    int64_t width = 0;  // R
    int64_t num_gate_blocks = 0;
    int64_t conv_width = 0;
};

void check_spec(const RecurrentSpec& spec, const std::string& layer);

struct LayerSpec {
    std::variant<AttentionSpec, RecurrentSpec> mixer;
    int64_t mlp_width = 0;  // F
    bool mlp_bias = false;
    bool norm_after_mixer = false;
    bool norm_after_mlp = false;
};

struct ModelSpec {
    int64_t model_width = 0;  // E
    int64_t vocab_size = 0;   // V
    float embedding_scale = 0;
    float norm_epsilon = 0;
    std::optional<float> final_softcap;
    std::vector<LayerSpec> layers;
};

}  // namespace gemma2_fast
