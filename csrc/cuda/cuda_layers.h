#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda/arena.h"
#include "runtime/cache_plan.h"
#include "spec/model_spec.h"

namespace gemma2_fast {

// How a matrix lies on the device, row after row; values are the kernels' constant FORMAT.
enum class DeviceFormat : int64_t {
    kBF16 = 0,
    kInt8 = 1,  // codes, and a bfloat16 scale for 128 columns
    kInt4 = 2,  // two codes a byte, the same scales, and a factor of four bits for 32 columns
};

struct DeviceMatrix {
    DeviceFormat format = DeviceFormat::kBF16;
    int64_t rows = 0, cols = 0;
    Arena::Slice weight{}, scales{}, factors{};
};

struct CudaAttention {
    AttentionSpec spec;
    DeviceMatrix qkv, output;  // rows of queries, then keys, then values
    std::optional<Arena::Slice> query_gain, key_gain;
    std::size_t rope_index = 0;  // into CudaModel::ropes
    CachePlace place;
};

struct CudaLayer {
    Arena::Slice gain_before_mixer;  // norms: w as stored, float32
    CudaAttention attention;
    std::optional<Arena::Slice> gain_after_mixer;
    Arena::Slice gain_before_mlp;
    int64_t mlp_width = 0;
    DeviceMatrix gate_up, down;  // rows of gate, then of up
    std::optional<Arena::Slice> gain_after_mlp;
};

// Where every weight of a model is to lie on the device. Tensors arrive one at a time by their canonical names; those
// that are read together, as queries, keys and values, lie together.
class CudaModel {
  public:
    // formats: of every matrix, by canonical name. Reserves memory, and throws BackendError for a mixer or a mixture of
    // formats that has no kernels.
    CudaModel(const ModelSpec& spec, const CachePlan& plan, const std::map<std::string, DeviceFormat>& formats,
              Arena& arena);

    // What a tensor's part ("weight", "scales", "factors") is to be copied to. Throws Error for unknown names.
    Arena::Slice place(const std::string& name, const std::string& part) const;
    std::vector<std::pair<std::string, std::string>> parts() const;  // all of them, tensor and part

    ModelSpec spec;
    DeviceMatrix embedding;
    std::vector<RopeSpec> ropes;  // the distinct ones
    std::vector<CudaLayer> layers;
    Arena::Slice final_gain;

  private:
    struct Part {
        std::string name;  // of the tensor
        int64_t rows;
    };

    DeviceMatrix joined(const std::vector<Part>& parts, int64_t cols);
    Arena::Slice gain(const std::string& name, int64_t width);
    CudaAttention load_attention(const AttentionSpec& attention, const std::string& prefix);

    const std::map<std::string, DeviceFormat> formats_;
    Arena& arena_;
    std::map<std::string, std::map<std::string, Arena::Slice>> places_;
};

}  // namespace gemma2_fast
