#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/cpu_features.h"
#include "weights/weight_view.h"

namespace gemma2_fast {

inline constexpr int64_t kPageTokens = 32;  // P: keys a page; two 16-lane vectors

enum class KvType { kF32, kBF16 };

// One layer's share of a paged cache group: [num_blocks, num_kv_heads, 2, D * P] elements. Of the inner pair the first
// is the keys, transposed to [D, P] so that a vector holds one dimension of consecutive keys; the second the values,
// [P, D].
struct KvPages {
    std::byte* data = nullptr;
    KvType type = KvType::kF32;
    int64_t num_kv_heads = 0;
    int64_t head_dim = 0;
};

// Queries of one sequence that share one kv head. Keys 0..position (or the window's) are read through the block table.
struct AttentionTask {
    const float* queries = nullptr;  // [num_queries, G, D]; a token's G heads are contiguous
    int64_t query_stride = 0;        // floats between consecutive tokens
    float* out = nullptr;            // [num_queries, G, D]
    int64_t out_stride = 0;
    int64_t num_queries = 0;
    int64_t first_position = 0;  // of the first query; the rest are consecutive
    int64_t group_heads = 0;     // G
    int64_t kv_head = 0;
    KvPages pages;
    const int32_t* block_table = nullptr;  // [table_width]; logical block b in column b % table_width
    int64_t table_width = 0;
    float query_scale = 0;
    std::optional<float> score_softcap;
    std::optional<int64_t> window_keys;  // query included
};

// The ops of one instruction set. Pointers and sizes only; float32 activations, contiguous unless a stride is given.
// Every function is safe to call from several threads on disjoint outputs. Each output element is reduced in an order
// that depends only on its own inputs and positions, never on how many tokens, rows or threads share the call.
struct Kernels {
    InstructionSet instruction_set;

    // out[cols] = the row's weights in float32, the exact value of the format.
    void (*dequantize_row)(WeightType type, const std::byte* row, int64_t cols, float* out);

    // out[t * out_stride + r] = sum_c weight[r, c] * x[t * cols + c] for r in [row_begin, row_end), t in [0,
    // num_tokens). scratch: matmul_scratch_floats(cols) floats of this thread's own.
    void (*matmul)(const WeightView& weight, int64_t row_begin, int64_t row_end, const float* x, int64_t num_tokens,
                   float* out, int64_t out_stride, float* scratch);
    int64_t (*matmul_scratch_floats)(int64_t cols);

    // out[t] = x[t] / sqrt(mean(x[t]^2) + epsilon) * gain; gain[E] is 1 + w. out may be x.
    void (*rms_norm)(const float* x, const float* gain, float epsilon, int64_t num_rows, int64_t width, float* out);
    // residual[t] += rms_norm(x[t])
    void (*rms_norm_add)(const float* x, const float* gain, float epsilon, int64_t num_rows, int64_t width,
                         float* residual);
    void (*add)(const float* x, int64_t count, float* residual);  // residual += x
    void (*scale)(float* x, int64_t count, float factor);         // x *= factor
    void (*softcap)(float* x, int64_t count, float cap);          // x = cap * tanh(x / cap)
    void (*geglu)(const float* gate, const float* up, int64_t count,
                  float* out);  // gelu_tanh(gate) * up; out may be gate

    // Rotates the first 2 * num_pairs dims of each head: (a_j, b_j) = (x_j, x_{j + num_pairs}).
    // x: [T, num_heads, head_dim]; cos, sin: [T, num_pairs].
    void (*rope)(float* x, const float* cos, const float* sin, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
                 int64_t num_pairs);

    // Stores one token's keys and values, each [num_kv_heads, D], in slot_in_page of page block_index.
    void (*write_kv)(const KvPages& pages, int64_t block_index, int64_t slot_in_page, const float* keys,
                     const float* values);
    void (*attention)(const AttentionTask& task, float* scratch);
    int64_t (*attention_scratch_floats)(int64_t group_heads, int64_t head_dim);
};

const Kernels& kernels_for(InstructionSet set);  // throws BackendError when the machine lacks the set

}  // namespace gemma2_fast
