#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/cpu_features.h"
#include "weights/strips.h"
#include "weights/weight_view.h"

namespace gemma2_fast {

inline constexpr int64_t kPageTokens = 32;    // P: keys a page; two 16-lane vectors
inline constexpr int64_t kBlockTokens = 256;  // keys whose part of a softmax is summed by itself; begins at a multiple

enum class KvType { kF32, kBF16, kInt8 };

// One layer's share of a paged cache group: [num_blocks, num_kv_heads] pages, laid out as cpu/kernels/kv_page.h says.
struct KvPages {
    std::byte* data = nullptr;
    KvType type = KvType::kF32;
    int64_t num_kv_heads = 0;
    int64_t head_dim = 0;
    int64_t page_bytes = 0;  // of one head: kv_page_bytes(type, head_dim)
};

int64_t kv_page_bytes(KvType type, int64_t head_dim);

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

// Consecutive tokens of one sequence through a depthwise causal convolution of num_taps taps.
struct Conv1dTask {
    const float* x = nullptr;  // [num_tokens, num_channels], rows x_stride floats apart
    int64_t x_stride = 0;
    float* tail = nullptr;  // [num_taps - 1, num_channels], the inputs before x; becomes those before the next token
    int64_t tail_stride = 0;
    const float* weights = nullptr;  // [num_taps, num_channels]; the last tap meets the token itself
    int64_t weights_stride = 0;
    const float* bias = nullptr;  // [num_channels]
    int64_t num_taps = 0;
    int64_t num_tokens = 0;
    int64_t num_channels = 0;
    float* out = nullptr;
    int64_t out_stride = 0;
};

// Consecutive tokens of one sequence through a real-gated linear recurrence. All rows are [num_tokens, num_channels].
struct RgLruTask {
    const float* x = nullptr;
    int64_t x_stride = 0;
    const float* input_gate = nullptr;  // both gates before their sigmoids
    const float* recurrence_gate = nullptr;
    int64_t gate_stride = 0;
    const float* log_decay = nullptr;  // [num_channels], log a where the gate is open: -8 softplus(decay)
    float* state = nullptr;            // [num_channels], the row before x; becomes the last row
    bool starts = false;               // x begins a sequence: its first row is not damped, and nothing is carried over
    int64_t num_tokens = 0;
    int64_t num_channels = 0;
    float* out = nullptr;
    int64_t out_stride = 0;
};

inline constexpr int64_t kQuantizedCols = 128;  // columns that share an activation scale
// token_stride is the number of tokens; beyond so many, the next multiple of kQuantizedTokens, which tiles read whole.
inline constexpr int64_t kMostUnpaddedTokens = 8;
inline constexpr int64_t kQuantizedTokens = 32;
inline constexpr int64_t kMostStripsAtOnce = 4;  // of one int8_matmul

// The largest two of a group's values, where they need more than eight bits: the four columns from 4 * step on get
// 128 * upper added to their codes. One of each four is `digit`, the others are zero.
struct Outliers {
    int8_t upper[2][4];
    int16_t step[2];
    int16_t digit[2];
};

// Activations of a step as integers: x = scale * (code + 128 * upper). Gemma has a few huge channels, which would cost
// the others of their group their precision (docs/decisions/004): where the largest magnitude is far above the third
// largest, that one sets the scale. Groups of kQuantizedCols columns come first, the last one filled up with zeros.
struct QuantizedRows {
    int8_t* codes = nullptr;          // [groups, token_stride, 128]
    Outliers* outliers = nullptr;     // [groups, token_stride], valid where has_outliers is 1
    uint8_t* has_outliers = nullptr;  // [groups, token_stride], 0 or 1; then eight that are read and not used
    float* scales = nullptr;          // [groups, token_stride]
    int32_t* sums = nullptr;          // [groups, token_stride], of code + 128 * upper
    int32_t* part_sums = nullptr;     // [groups, token_stride, 8], of 16 codes each
    int64_t token_stride = 0;
};

// The ops of one instruction set. Pointers and sizes only; float32 activations, contiguous unless a stride is given.
// Every function is safe to call from several threads on disjoint outputs. Each output element is reduced in an order
// that depends only on its own inputs and positions, never on how many tokens, rows or threads share the call.
struct Kernels {
    InstructionSet instruction_set;

    // out[cols] = one row's weights in float32, the exact value of the format.
    void (*dequantize_row)(const WeightView& weight, int64_t row, float* out);

    // out[t * out_stride + r] = sum_c weight[r, c] * x[t * cols + c] for r in [row_begin, row_end), t in [0,
    // num_tokens). scratch: matmul_scratch_floats(cols) floats of this thread's own.
    void (*matmul)(const WeightView& weight, int64_t row_begin, int64_t row_end, const float* x, int64_t num_tokens,
                   float* out, int64_t out_stride, float* scratch);
    int64_t (*matmul_scratch_floats)(int64_t cols);

    // Quantises x [num_tokens, cols], whose rows are x_stride floats apart, into rows first_token.. and groups
    // first_group.. of out: to nearest, ties to even. With the magnitudes of a group sorted, scale = first / 127, or
    // max(third / 127, first / 16256) where first > 2 third. A group that holds a NaN or an infinity gets the scale
    // NaN.
    void (*quantize_rows)(const float* x, int64_t x_stride, int64_t num_tokens, int64_t cols, int64_t first_token,
                          int64_t first_group, const QuantizedRows& out);
    // out[t * out_stride + r] = sum_c weight[64 * first_strip + r, c] * x[t, c] for the rows of up to kMostStripsAtOnce
    // strips, which read memory better than one by one: int32 sums over the columns that share both scales, float32
    // sums over those. scratch: int8_matmul_scratch_floats(num_tokens) floats on a cache line, this thread's own.
    void (*int8_matmul)(const StripView& weight, int64_t first_strip, int64_t num_strips, const QuantizedRows& x,
                        int64_t num_tokens, float* out, int64_t out_stride, float* scratch);
    int64_t (*int8_matmul_scratch_floats)(int64_t num_tokens);

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

    // out[t] = bias + sum_i weights[i] * x[t + i - (num_taps - 1)]
    void (*conv1d)(const Conv1dTask& task);
    // out[t] = a out[t - 1] + sqrt(1 - a^2) sigmoid(input_gate[t]) x[t], a = exp(log_decay sigmoid(recurrence_gate[t]))
    void (*rg_lru)(const RgLruTask& task);

    // Stores one token's keys and values, each [num_kv_heads, D], in slot_in_page of page block_index.
    void (*write_kv)(const KvPages& pages, int64_t block_index, int64_t slot_in_page, const float* keys,
                     const float* values);
    void (*attention)(const AttentionTask& task, float* scratch);
    // The same in two steps, with the same bits, so that threads can share the keys of a task: the parts of blocks
    // [first_block, end_block) of kBlockTokens keys go to parts [end_block - first_block][num_queries * G], each
    // attention_part_floats(head_dim) floats; then all of them, from the first block with a visible key on, become out.
    void (*attention_parts)(const AttentionTask& task, int64_t first_block, int64_t end_block, float* parts,
                            float* scratch);
    void (*join_attention_parts)(const AttentionTask& task, const float* parts, int64_t num_blocks, float* scratch);
    int64_t (*attention_part_floats)(int64_t head_dim);
    int64_t (*attention_scratch_floats)(int64_t group_heads, int64_t head_dim);
    int64_t (*attention_queries)(int64_t group_heads);  // a task of so many queries reads each page once
};

const Kernels& kernels_for(InstructionSet set);  // throws BackendError when the machine lacks the set

}  // namespace gemma2_fast
