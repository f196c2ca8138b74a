#include "cuda/cuda_layers.h"

#include <algorithm>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kScaleCols = 128;  // columns that share a scale
constexpr int64_t kFactorBytes = 2;  // of the four factors that share one
constexpr int64_t kMultiple = 16;    // what kernels were promised of rows and columns

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct RowBytes {
    int64_t weight, scales, factors;
};

RowBytes row_bytes(DeviceFormat format, int64_t cols) {
    const int64_t groups = divide_up(cols, kScaleCols);
    switch (format) {
        case DeviceFormat::kBF16:
            return {2 * cols, 0, 0};
        case DeviceFormat::kInt8:
            return {cols, 2 * groups, 0};
        case DeviceFormat::kInt4:
            return {cols / 2, 2 * groups, kFactorBytes * groups};
    }
    throw Error("a weight format that the device does not know");
}

}  // namespace

CudaModel::CudaModel(const ModelSpec& model_spec, const CachePlan& plan,
                     const std::map<std::string, DeviceFormat>& formats, Arena& arena)
    : spec(model_spec), formats_(formats), arena_(arena) {
    const int64_t width = spec.model_width;
    embedding = joined({{"embedding", spec.vocab_size}}, width);
    for (std::size_t index = 0; index < spec.layers.size(); ++index) {
        const LayerSpec& layer_spec = spec.layers[index];
        const auto* attention = std::get_if<AttentionSpec>(&layer_spec.mixer);
        if (!attention) throw BackendError("backend=\"cuda\" has no recurrent layers yet; use backend=\"cpu\"");
        if (attention->output_bias || layer_spec.mlp_bias)
            throw BackendError("backend=\"cuda\" has no biases yet; use backend=\"cpu\"");
        const std::string prefix = "layers." + std::to_string(index) + ".";
        CudaLayer layer;
        layer.gain_before_mixer = gain(prefix + "norm_before_mixer", width);
        check_spec(*attention, prefix + "attention: ");
        layer.attention = load_attention(*attention, prefix + "attention.");
        layer.attention.place = place_in_cache(plan, static_cast<int32_t>(index), attention->num_kv_heads,
                                               attention->head_dim, attention->window_keys);
        if (layer_spec.norm_after_mixer) layer.gain_after_mixer = gain(prefix + "norm_after_mixer", width);
        layer.gain_before_mlp = gain(prefix + "norm_before_mlp", width);
        layer.mlp_width = layer_spec.mlp_width;
        layer.gate_up = joined({{prefix + "mlp.gate", layer.mlp_width}, {prefix + "mlp.up", layer.mlp_width}}, width);
        layer.down = joined({{prefix + "mlp.down", width}}, layer.mlp_width);
        if (layer_spec.norm_after_mlp) layer.gain_after_mlp = gain(prefix + "norm_after_mlp", width);
        layers.push_back(layer);
    }
    final_gain = gain("final_norm", width);
}

Arena::Slice CudaModel::place(const std::string& name, const std::string& part) const {
    const auto tensor = places_.find(name);
    if (tensor == places_.end()) throw Error("weights: the model has no tensor " + name);
    const auto slice = tensor->second.find(part);
    if (slice == tensor->second.end()) throw Error("weights: " + name + " has no " + part + " in its format");
    return slice->second;
}

std::vector<std::pair<std::string, std::string>> CudaModel::parts() const {
    std::vector<std::pair<std::string, std::string>> all;
    for (const auto& [name, parts] : places_)
        for (const auto& [part, slice] : parts) all.emplace_back(name, part);
    return all;
}

DeviceMatrix CudaModel::joined(const std::vector<Part>& parts, int64_t cols) {
    const auto format_of = [&](const Part& part) {
        const auto found = formats_.find(part.name);
        if (found == formats_.end()) throw Error("weights: " + part.name + " is missing");
        return found->second;
    };
    DeviceMatrix matrix{.format = format_of(parts.front()), .cols = cols};
    for (const Part& part : parts) {
        if (format_of(part) != matrix.format)
            throw BackendError("weights: " + part.name + " and " + parts.front().name +
                               " must have one format, because a GPU kernel reads them as one matrix");
        matrix.rows += part.rows;
    }
    if (matrix.rows % kMultiple != 0 || cols % kMultiple != 0)
        throw BackendError("weights: " + parts.front().name + " is of " + std::to_string(matrix.rows) + " rows and " +
                           std::to_string(cols) + " columns, GPU kernels need multiples of " +
                           std::to_string(kMultiple));
    const RowBytes bytes = row_bytes(matrix.format, cols);
    matrix.weight = arena_.reserve(matrix.rows * bytes.weight);
    matrix.scales = arena_.reserve(matrix.rows * bytes.scales);
    matrix.factors = arena_.reserve(matrix.rows * bytes.factors);
    int64_t row = 0;
    for (const Part& part : parts) {
        const auto add = [&](const char* name, const Arena::Slice& whole, int64_t bytes_a_row) {
            if (bytes_a_row > 0) places_[part.name][name] = {whole.offset + row * bytes_a_row, part.rows * bytes_a_row};
        };
        add("weight", matrix.weight, bytes.weight);
        add("scales", matrix.scales, bytes.scales);
        add("factors", matrix.factors, bytes.factors);
        row += part.rows;
    }
    return matrix;
}

Arena::Slice CudaModel::gain(const std::string& name, int64_t width) {
    return places_[name]["weight"] = arena_.reserve(width * static_cast<int64_t>(sizeof(float)));
}

CudaAttention CudaModel::load_attention(const AttentionSpec& spec, const std::string& prefix) {
    const int64_t query_rows = spec.num_query_heads * spec.head_dim, kv_rows = spec.num_kv_heads * spec.head_dim;
    CudaAttention attention;
    attention.spec = spec;
    attention.qkv = joined({{prefix + "query", query_rows}, {prefix + "key", kv_rows}, {prefix + "value", kv_rows}},
                           this->spec.model_width);
    attention.output = joined({{prefix + "output", this->spec.model_width}}, query_rows);
    if (spec.qk_norm) {
        attention.query_gain = gain(prefix + "query_norm", spec.head_dim);
        attention.key_gain = gain(prefix + "key_norm", spec.head_dim);
    }
    const auto rope = std::find(ropes.begin(), ropes.end(), spec.rope);
    attention.rope_index = static_cast<std::size_t>(rope - ropes.begin());
    if (rope == ropes.end()) ropes.push_back(spec.rope);
    return attention;
}

}  // namespace gemma2_fast
