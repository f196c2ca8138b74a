#include "cpu/cpu_layers.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

AlignedBuffer<float> load_floats(const ModelWeights& weights, const std::string& name, int64_t rows, int64_t cols,
                                 const Kernels& kernels) {
    const WeightView& view = weights.at(name, rows, cols);
    AlignedBuffer<float> floats(static_cast<std::size_t>(rows * cols));
    for (int64_t row = 0; row < rows; ++row) kernels.dequantize_row(view, row, floats.data() + row * cols);
    return floats;
}

Gain load_gain(const ModelWeights& weights, const std::string& name, int64_t width, const Kernels& kernels) {
    Gain gain = load_floats(weights, name, 1, width, kernels);
    for (float& value : gain.span()) value += 1.0f;
    return gain;
}

// Blocks are stored as [in, out]; a matmul reads [out, in].
Gate load_gate(const ModelWeights& weights, const std::string& name, const RecurrentSpec& spec,
               const Kernels& kernels) {
    const int64_t num_blocks = spec.num_gate_blocks, width = spec.width / num_blocks;
    const WeightView& stored = weights.at(name, spec.width, width);
    const WeightFormat& format = weight_format(stored.type);
    if (format.block_weights > 1)
        throw Error("weights: " + name + " must not be quantised, it is " + std::string(format.name));
    Gate gate;
    gate.bytes = AlignedBuffer<std::byte>(static_cast<std::size_t>(stored.num_bytes()));
    gate.blocks = stored;
    gate.blocks.data = gate.bytes.data();
    const int64_t size = format.block_bytes;
    for (int64_t row = 0; row < spec.width; ++row)
        for (int64_t col = 0; col < width; ++col) {
            const int64_t turned = (row / width * width + col) * width + row % width;
            std::memcpy(gate.bytes.data() + turned * size, stored.row(row) + col * size,
                        static_cast<std::size_t>(size));
        }
    gate.bias = load_floats(weights, name + "_bias", num_blocks, width, kernels);
    return gate;
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
    attention.output = matrix(prefix + "output", width, query_width, spec.output_bias);
    if (spec.qk_norm) {
        attention.query_gain = load_gain(weights, prefix + "query_norm", spec.head_dim, kernels);
        attention.key_gain = load_gain(weights, prefix + "key_norm", spec.head_dim, kernels);
    }
    return attention;
}

template <typename Load>
CpuRecurrent load_recurrent(const RecurrentSpec& spec, const ModelWeights& weights, const std::string& prefix,
                            int64_t width, const Kernels& kernels, const Load& matrix) {
    CpuRecurrent recurrent;
    recurrent.spec = spec;
    recurrent.linear_x = matrix(prefix + "linear_x", spec.width, width, true);
    recurrent.linear_y = matrix(prefix + "linear_y", spec.width, width, true);
    recurrent.linear_out = matrix(prefix + "linear_out", width, spec.width, true);
    const AlignedBuffer<float> taps = load_floats(weights, prefix + "conv", spec.width, spec.conv_width, kernels);
    recurrent.conv_weights = AlignedBuffer<float>(taps.size());
    for (int64_t channel = 0; channel < spec.width; ++channel)
        for (int64_t tap = 0; tap < spec.conv_width; ++tap)
            recurrent.conv_weights[tap * spec.width + channel] = taps[channel * spec.conv_width + tap];
    recurrent.conv_bias = load_floats(weights, prefix + "conv_bias", 1, spec.width, kernels);
    recurrent.input_gate = load_gate(weights, prefix + "input_gate", spec, kernels);
    recurrent.recurrence_gate = load_gate(weights, prefix + "recurrence_gate", spec, kernels);
    recurrent.log_decay = load_floats(weights, prefix + "decay", 1, spec.width, kernels);
    for (float& decay : recurrent.log_decay.span()) {
        const double softplus =
            std::max<double>(decay, 0) + std::log1p(std::exp(-std::abs(static_cast<double>(decay))));
        decay = static_cast<float>(-8 * softplus);
    }
    return recurrent;
}

void join_cache_group(CpuRecurrent& recurrent, int32_t layer, const CachePlan& plan) {
    const RecurrentSpec& spec = recurrent.spec;
    recurrent.group_layer = place_in_states(plan, layer, spec.width, spec.conv_width - 1);
}

void join_cache_group(CpuAttention& attention, int32_t layer, const CachePlan& plan) {
    const AttentionSpec& spec = attention.spec;
    attention.place = place_in_cache(plan, layer, spec.num_kv_heads, spec.head_dim, spec.window_keys);
}

}  // namespace

std::vector<const Matrix*> input_matrices(const CpuLayer& layer) {
    if (const auto* a = std::get_if<CpuAttention>(&layer.mixer))
        return {&a->query, &a->key, &a->value, &a->output, &layer.gate, &layer.up};
    const auto& r = std::get<CpuRecurrent>(layer.mixer);
    return {&r.linear_x, &r.linear_y, &r.linear_out, &layer.gate, &layer.up};
}

CpuModel::CpuModel(const ModelSpec& model_spec, ModelWeights model_weights, const CachePlan& plan,
                   const Kernels& kernels, Activations activations, ThreadPool& threads)
    : spec(model_spec), weights(std::move(model_weights)) {
    const auto matrix = [&](const std::string& name, int64_t rows, int64_t cols, bool has_bias = false) {
        Matrix loaded = load_matrix(weights, name, rows, cols, activations, threads);
        if (has_bias) loaded.bias = load_floats(weights, name + "_bias", 1, rows, kernels);
        return loaded;
    };
    int64_t width = spec.model_width;
    embedding = matrix("embedding", spec.vocab_size, width);
    for (std::size_t index = 0; index < spec.layers.size(); ++index) {
        const LayerSpec& layer_spec = spec.layers[index];
        std::string prefix = "layers." + std::to_string(index) + ".";
        CpuLayer layer;
        layer.gain_before_mixer = load_gain(weights, prefix + "norm_before_mixer", width, kernels);
        if (const auto* recurrent = std::get_if<RecurrentSpec>(&layer_spec.mixer)) {
            check_spec(*recurrent, prefix + "recurrent: ");
            layer.mixer = load_recurrent(*recurrent, weights, prefix + "recurrent.", width, kernels, matrix);
        } else {
            const auto& attention = std::get<AttentionSpec>(layer_spec.mixer);
            check_spec(attention, prefix + "attention: ");
            CpuAttention loaded = load_attention(attention, weights, prefix + "attention.", width, kernels, matrix);
            auto rope = std::find(ropes.begin(), ropes.end(), attention.rope);
            loaded.rope_index = static_cast<std::size_t>(rope - ropes.begin());
            if (rope == ropes.end()) ropes.push_back(attention.rope);
            layer.mixer = std::move(loaded);
        }
        std::visit([&](auto& mixer) { join_cache_group(mixer, static_cast<int32_t>(index), plan); }, layer.mixer);
        if (layer_spec.norm_after_mixer)
            layer.gain_after_mixer = load_gain(weights, prefix + "norm_after_mixer", width, kernels);
        layer.gain_before_mlp = load_gain(weights, prefix + "norm_before_mlp", width, kernels);
        layer.mlp_width = layer_spec.mlp_width;
        layer.gate = matrix(prefix + "mlp.gate", layer.mlp_width, width, layer_spec.mlp_bias);
        layer.up = matrix(prefix + "mlp.up", layer.mlp_width, width, layer_spec.mlp_bias);
        layer.down = matrix(prefix + "mlp.down", width, layer.mlp_width, layer_spec.mlp_bias);
        if (layer_spec.norm_after_mlp)
            layer.gain_after_mlp = load_gain(weights, prefix + "norm_after_mlp", width, kernels);
        layers.push_back(std::move(layer));
    }
    final_gain = load_gain(weights, "final_norm", width, kernels);
}

}  // namespace gemma2_fast
