#pragma once

#include <optional>
#include <variant>
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

// A gate of a recurrent layer: a matrix of diagonal blocks.
struct Gate {
    AlignedBuffer<std::byte> bytes;  // the stored elements, each block turned to [out, in]
    WeightView blocks;               // of them: [R, R / num_gate_blocks]
    AlignedBuffer<float> bias;       // [R]
};

struct CpuRecurrent {
    RecurrentSpec spec;
    Matrix linear_x, linear_y, linear_out;
    AlignedBuffer<float> conv_weights;  // [taps, R]
    AlignedBuffer<float> conv_bias;     // [R]
    Gate input_gate, recurrence_gate;
    AlignedBuffer<float> log_decay;  // [R], -8 softplus(decay)
    int64_t group_layer = 0;         // this layer's place in CachePlan::recurrent
};

struct CpuLayer {
    Gain gain_before_mixer;
    std::variant<CpuAttention, CpuRecurrent> mixer;
    std::optional<Gain> gain_after_mixer;
    Gain gain_before_mlp;
    int64_t mlp_width = 0;
    Matrix gate, up, down;
    std::optional<Gain> gain_after_mlp;
};

// All of a layer's matrices but `down`: what multiplies rows of the model, of the heads or of the recurrence.
std::vector<const Matrix*> input_matrices(const CpuLayer& layer);

// A model prepared for the CPU: weights looked up and checked once, norms folded to 1 + w, layers joined to their cache
// group.
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
