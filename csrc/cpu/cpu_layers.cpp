#include "cpu/cpu_layers.h"

#include <algorithm>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

Gain load_gain(const ModelWeights& weights, const std::string& name, int64_t width, const Kernels& kernels) {
    const WeightView& view = weights.at(name, 1, width);
    Gain gain(static_cast<std::size_t>(width));
    kernels.dequantize_row(view, 0, gain.data());
    for (float& value : gain.span()) value += 1.0f;
    return gain;
}

template <typename Load>
CpuAttention load_attention(const AttentionSpec& spec, const ModelWeights& weights, const std::string& prefix,
                            int64_t width, const Kernels& kernels, const Load& matrix) {
    CpuAttention attention;
    attention.spec = spec;
    int64_t query_width = spec.num_query_heads * spec.head_dim, kv_width = spec.num_kv_heads * spec.head_dim;
    attention.query = matrix(prefix + "query", query_width, width);
    attention.key = matrix(prefix + "key", kv_width, width);
    attention.value = matrix(prefix + "value", kv_width, width);
    attention.output = matrix(prefix + "output", width, query_width);
    if (spec.qk_norm) {
        attention.query_gain = load_gain(weights, prefix + "query_norm", spec.head_dim, kernels);
        attention.key_gain = load_gain(weights, prefix + "key_norm", spec.head_dim, kernels);
    }
    return attention;
}

}  // namespace

CpuModel::CpuModel(const ModelSpec& model_spec, ModelWeights model_weights, const CachePlan& plan,
                   const Kernels& kernels, Activations activations, ThreadPool& threads)
    : spec(model_spec), weights(std::move(model_weights)) {
    const auto matrix = [&](const std::string& name, int64_t rows, int64_t cols) {
        return load_matrix(weights, name, rows, cols, activations, threads);
    };
    int64_t width = spec.model_width;
    embedding = matrix("embedding", spec.vocab_size, width);
    for (std::size_t index = 0; index < spec.layers.size(); ++index) {
        const LayerSpec& layer_spec = spec.layers[index];
        const auto* attention_spec = std::get_if<AttentionSpec>(&layer_spec.mixer);
        if (!attention_spec)
            throw BackendError("the CPU backend has no recurrent layers yet; use a Gemma 1, 2 or 3 model");
        std::string prefix = "layers." + std::to_string(index) + ".";
        check_spec(*attention_spec, prefix + "attention: ");
        CpuLayer layer;
        layer.gain_before_mixer = load_gain(weights, prefix + "norm_before_mixer", width, kernels);
        layer.attention = load_attention(*attention_spec, weights, prefix + "attention.", width, kernels, matrix);
        layer.attention.place = place_in_cache(plan, static_cast<int32_t>(index), attention_spec->num_kv_heads,
                                               attention_spec->head_dim, attention_spec->window_keys);
        auto rope = std::find(ropes.begin(), ropes.end(), attention_spec->rope);
        layer.attention.rope_index = static_cast<std::size_t>(rope - ropes.begin());
        if (rope == ropes.end()) ropes.push_back(attention_spec->rope);
        if (layer_spec.norm_after_mixer)
            layer.gain_after_mixer = load_gain(weights, prefix + "norm_after_mixer", width, kernels);
        layer.gain_before_mlp = load_gain(weights, prefix + "norm_before_mlp", width, kernels);
        layer.mlp_width = layer_spec.mlp_width;
        layer.gate = matrix(prefix + "mlp.gate", layer.mlp_width, width);
        layer.up = matrix(prefix + "mlp.up", layer.mlp_width, width);
        layer.down = matrix(prefix + "mlp.down", width, layer.mlp_width);
        if (layer_spec.norm_after_mlp)
            layer.gain_after_mlp = load_gain(weights, prefix + "norm_after_mlp", width, kernels);
        layers.push_back(std::move(layer));
    }
    final_gain = load_gain(weights, "final_norm", width, kernels);
}

}  // namespace gemma2_fast
