// The functions behind the entries of Kernels (see there), once per instruction set.
#pragma once

#include "cpu/kernels.h"
#include "cpu/simd.h"

GEMMA2_FAST_BEGIN_ISA

void dequantize_row(const WeightView& weight, int64_t row, float* out);
void matmul(const WeightView& weight, int64_t row_begin, int64_t row_end, const float* x, int64_t num_tokens,
            float* out, int64_t out_stride, float* scratch);
int64_t matmul_scratch_floats(int64_t cols);
void quantize_rows(const float* x, int64_t x_stride, int64_t num_tokens, int64_t cols, int64_t first_token,
                   int64_t first_group, const QuantizedRows& out);
void int8_matmul(const StripView& weight, int64_t first_strip, int64_t num_strips, const QuantizedRows& x,
                 int64_t num_tokens, float* out, int64_t out_stride, float* scratch);
int64_t int8_matmul_scratch_floats(int64_t num_tokens);

void rms_norm(const float* x, const float* gain, float epsilon, int64_t num_rows, int64_t width, float* out);
void rms_norm_add(const float* x, const float* gain, float epsilon, int64_t num_rows, int64_t width, float* residual);
void add(const float* x, int64_t count, float* residual);
void scale(float* x, int64_t count, float factor);
void softcap(float* x, int64_t count, float cap);
void geglu(const float* gate, const float* up, int64_t count, float* out);
void rope(float* x, const float* cos, const float* sin, int64_t num_tokens, int64_t num_heads, int64_t head_dim,
          int64_t num_pairs);

void conv1d(const Conv1dTask& task);
void rg_lru(const RgLruTask& task);

void write_kv(const KvPages& pages, int64_t block_index, int64_t slot_in_page, const float* keys, const float* values);
void attention(const AttentionTask& task, float* scratch);
void attention_parts(const AttentionTask& task, int64_t first_block, int64_t end_block, float* parts, float* scratch);
void join_attention_parts(const AttentionTask& task, const float* parts, int64_t num_blocks, float* scratch);
int64_t attention_part_floats(int64_t head_dim);
int64_t attention_scratch_floats(int64_t group_heads, int64_t head_dim);
int64_t attention_queries(int64_t group_heads);

GEMMA2_FAST_END_ISA
