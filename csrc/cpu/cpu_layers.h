#pragma once

#include <optional>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/kernels.h"
#include "cpu/matrix.h"
#include "runtime/cache_plan.h"
#include "spec/model_spec.h"
#include "weights/model_weights.h"

namespace gemma2_fast {

using Gain = AlignedBuffer<float>;  // 1 + w of an RMSNorm, [width]

struct CpuAttention {
    AttentionSpec spec;
    Matrix query, key, value, output;
    std::optional<Gain> query_gain, key_gain;
    std::size_t rope_index = 0;  // into CpuModel::ropes
    CachePlace place;
};

struct CpuLayer {
    Gain gain_before_mixer;
    CpuAttention attention;
    std::optional<Gain> gain_after_mixer;
    Gain gain_before_mlp;
    int64_t mlp_width = 0;
    Matrix gate, up, down;
    std::optional<Gain> gain_after_mlp;
};

// A model prepared for the CPU: weights looked up and checked once, norms folded to 1 + w, layers joined to their cache
// group. Throws BackendError for a mixer that has no CPU implementation.
struct CpuModel {
    CpuModel(const ModelSpec& spec, ModelWeights weights, const CachePlan& plan, const Kernels& kernels,
             Activations activations, ThreadPool& threads);

    ModelSpec spec;
    ModelWeights weights;
    Matrix embedding;
    std::vector<RopeSpec> ropes;  // the distinct ones
    std::vector<CpuLayer> layers;
    Gain final_gain;
};

}  // namespace gemma2_fast
