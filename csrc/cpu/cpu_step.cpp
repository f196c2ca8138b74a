#include "cpu/cpu_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "base/errors.h"
#include "base/huge_pages.h"
#include "runtime/check_batch.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kHiddenPerTask = 128;  // MLP neurons claimed at once: a group of the quantised hidden rows
constexpr int64_t kTokensPerTask = 8;    // tokens of an elementwise op claimed at once
// Strips of a matrix are claimed several at once, in pairs as a single token reads them, where each thread still finds
// so many tasks.
constexpr int64_t kTasksPerThread = 6;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t page_bytes(const PagedKvGroup& group, KvType type) {
    return group.num_kv_heads * kv_page_bytes(type, group.head_dim);
}

}  // namespace

CpuStep::CpuStep(const ModelSpec& spec, ModelWeights weights, const CachePlan& plan, const Options& options)
    : kernels_(kernels_for(options.instruction_set)),
      options_(options),
      plan_(plan),
      threads_(options.num_threads),
      model_(spec, std::move(weights), plan, kernels_, options.activations, threads_) {
    if (plan.page_tokens != kPageTokens)
        throw Error("cache plan: pages of " + std::to_string(plan.page_tokens) + " tokens, the kernels have " +
                    std::to_string(kPageTokens));
    constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
    if (options.max_step_tokens < 1 || options.max_step_tokens > kMost || options.max_logits_rows < 1 ||
        options.max_logits_rows > kMost)
        throw CapacityError("max_step_tokens and max_logits_rows must lie between 1 and 2^31 - 1, got " +
                            std::to_string(options.max_step_tokens) + " and " +
                            std::to_string(options.max_logits_rows));
    int64_t query_width = 0, kv_width = 0, mlp_width = 0, kv_heads = 0, recurrent_width = 0, gate_block_width = 0;
    int64_t attention_scratch = 0, attention_parts = 0;
    int64_t tokens = options.max_step_tokens, input_rows = std::max(tokens, options.max_logits_rows);
    bool quantizes_hidden = false, plain_hidden = false;
    quantizes_ = model_.embedding.strips.has_value();
    scratch_floats_ =
        std::max(kernels_.matmul_scratch_floats(spec.model_width), kernels_.int8_matmul_scratch_floats(input_rows));
    const auto measure_attention = [&](const CpuAttention& layer) {
        const AttentionSpec& attention = layer.spec;
        int64_t group_heads = attention.num_query_heads / attention.num_kv_heads;
        query_width = std::max(query_width, attention.num_query_heads * attention.head_dim);
        kv_width = std::max(kv_width, attention.num_kv_heads * attention.head_dim);
        kv_heads = std::max(kv_heads, attention.num_kv_heads);
        attention_scratch =
            std::max(attention_scratch, kernels_.attention_scratch_floats(group_heads, attention.head_dim));
        const int64_t keys = plan.paged[layer.place.group_index].table_width * kPageTokens;
        attention_parts =
            std::max(attention_parts, AttentionRun::part_floats(kernels_, group_heads, attention.head_dim, keys));
    };
    const auto measure_recurrent = [&](const CpuRecurrent& layer) {
        recurrent_width = std::max(recurrent_width, layer.spec.width);
        gate_block_width = std::max(gate_block_width, layer.spec.width / layer.spec.num_gate_blocks);
    };
    for (const CpuLayer& layer : model_.layers) {
        mlp_width = std::max(mlp_width, layer.mlp_width);
        (layer.down.strips ? quantizes_hidden : plain_hidden) = true;
        for (const Matrix* matrix : input_matrices(layer)) {
            quantizes_ = quantizes_ || matrix->strips;
            scratch_floats_ = std::max(scratch_floats_, kernels_.matmul_scratch_floats(matrix->stored.cols));
        }
        scratch_floats_ = std::max(scratch_floats_, kernels_.matmul_scratch_floats(layer.mlp_width));
        if (const auto* attention = std::get_if<CpuAttention>(&layer.mixer))
            measure_attention(*attention);
        else
            measure_recurrent(std::get<CpuRecurrent>(layer.mixer));
    }
    matmul_scratch_floats_ = divide_up(scratch_floats_, 16) * 16;
    // The MLP keeps its gate and up rows behind the matmul's own scratch.
    scratch_floats_ = matmul_scratch_floats_ + 2 * tokens * kHiddenPerTask;

    try {
        for (const PagedKvGroup& group : plan.paged) {
            cache_.emplace_back(group.layers.size() *
                                static_cast<std::size_t>(group.num_blocks * page_bytes(group, options.kv_type)));
            prefer_huge_pages(cache_.back().data(), cache_.back().size());
        }
        auto rows = [&](int64_t count, int64_t width) {
            return AlignedBuffer<float>(static_cast<std::size_t>(count * width));
        };
        residual_ = rows(tokens, spec.model_width);
        normed_ = rows(input_rows, spec.model_width);
        branch_ = rows(tokens, spec.model_width);
        queries_ = rows(tokens, query_width);
        keys_ = rows(tokens, kv_width);
        values_ = rows(tokens, kv_width);
        attention_ = rows(tokens, query_width);
        if (plain_hidden) hidden_ = rows(tokens, mlp_width);
        if (quantizes_)
            quantized_ = QuantizedBuffer(input_rows, std::max({spec.model_width, query_width, recurrent_width}));
        if (quantizes_hidden) quantized_hidden_ = QuantizedBuffer(tokens, mlp_width);
        for (const RopeSpec& rope : model_.ropes) {
            cos_.push_back(rows(tokens, static_cast<int64_t>(rope.inverse_frequencies.size())));
            sin_.push_back(rows(tokens, static_cast<int64_t>(rope.inverse_frequencies.size())));
        }
        scratch_ = rows(threads_.num_threads(), scratch_floats_);
        tasks_.reserve(static_cast<std::size_t>(tokens * kv_heads));
        attention_run_.emplace(kernels_, threads_.num_threads(), tokens * kv_heads, attention_parts, attention_scratch);
        if (recurrent_width > 0)
            recurrent_mixer_.emplace(kernels_, *plan.recurrent, gate_block_width, threads_.num_threads(), tokens);
    } catch (const std::bad_alloc&) {
        throw CapacityError(
            "not enough memory for the cache and one step's activations; lower max_seq_len, max_batch_size or "
            "kv_cache_gib");
    }
}

void CpuStep::run(const StepBatch& batch, std::span<float> logits) {
    check_batch(batch, plan_, {options_.max_step_tokens, options_.max_logits_rows, model_.spec.vocab_size},
                static_cast<int64_t>(logits.size()));
    if (recurrent_mixer_) recurrent_mixer_->copy_states(batch.state_copies);
    embed(batch);
    compute_rope_tables(batch);
    for (const CpuLayer& layer : model_.layers) {
        mix(layer, batch);
        mlp(layer, batch.num_tokens());
    }
    project_logits(batch, logits);
}

void CpuStep::poison_cache() {
    for (AlignedBuffer<std::byte>& pages : cache_)
        std::memset(pages.data(), 0xff, pages.size());  // all ones is a NaN as an element and as a scale
    if (recurrent_mixer_) recurrent_mixer_->poison();
}

void CpuStep::embed(const StepBatch& batch) {
    int64_t width = model_.spec.model_width;
    for_tokens(batch.num_tokens(), [&](int64_t first, int64_t count) {
        for (int64_t t = first; t < first + count; ++t) {
            float* row = residual_.data() + t * width;
            kernels_.dequantize_row(model_.embedding.stored, batch.token_ids[t], row);
            kernels_.scale(row, width, model_.spec.embedding_scale);
        }
    });
}

void CpuStep::compute_rope_tables(const StepBatch& batch) {
    for (std::size_t rope = 0; rope < model_.ropes.size(); ++rope) {
        const std::vector<float>& frequencies = model_.ropes[rope].inverse_frequencies;
        int64_t pairs = static_cast<int64_t>(frequencies.size());
        for_tokens(batch.num_tokens(), [&](int64_t first, int64_t count) {
            for (int64_t t = first; t < first + count; ++t)
                for (int64_t pair = 0; pair < pairs; ++pair) {
                    float angle = static_cast<float>(batch.positions[t]) * frequencies[pair];
                    cos_[rope][t * pairs + pair] = std::cos(angle);
                    sin_[rope][t * pairs + pair] = std::sin(angle);
                }
        });
    }
}

void CpuStep::mix(const CpuLayer& layer, const StepBatch& batch) {
    const Input input = normalized(layer.gain_before_mixer, batch.num_tokens());
    std::visit([&](const auto& mixer) { mix(mixer, input, batch); }, layer.mixer);
    add_branch(layer.gain_after_mixer, batch.num_tokens());
}

void CpuStep::mix(const CpuAttention& attention, const Input& input, const StepBatch& batch) {
    matmul(input,
           {{attention.query, queries_.data()}, {attention.key, keys_.data()}, {attention.value, values_.data()}});
    rotate_and_store(attention, batch);
    attend(attention, batch);
    matmul(quantized(attention_.data(), attention.output.stored.cols, batch.num_tokens()),
           {{attention.output, branch_.data()}});
}

void CpuStep::mix(const CpuRecurrent& recurrent, const Input& input, const StepBatch& batch) {
    matmul(input, {{recurrent.linear_x, recurrent_mixer_->inputs()}, {recurrent.linear_y, recurrent_mixer_->gates()}});
    const float* rows = recurrent_mixer_->run(recurrent, batch, threads_);
    matmul(quantized(rows, recurrent.spec.width, batch.num_tokens()), {{recurrent.linear_out, branch_.data()}});
}

// Gate, up, GELU and the quantisation of what comes out are one region: a task makes one group of hidden columns.
void CpuStep::mlp(const CpuLayer& layer, int64_t num_tokens) {
    const Input input = normalized(layer.gain_before_mlp, num_tokens);
    const Input hidden{hidden_.data(), quantized_hidden_.rows(num_tokens), num_tokens};
    threads_.parallel_for(divide_up(layer.mlp_width, kHiddenPerTask), [&](int64_t group, int thread) {
        const int64_t first = group * kHiddenPerTask, width = std::min(kHiddenPerTask, layer.mlp_width - first);
        float* gate = scratch(thread) + matmul_scratch_floats_;
        float* up = gate + num_tokens * kHiddenPerTask;
        const int64_t first_strip = first / kStripRows, num_strips = divide_up(width, kStripRows);
        matmul_strips(layer.gate, first_strip, num_strips, input, gate, kHiddenPerTask, thread);
        matmul_strips(layer.up, first_strip, num_strips, input, up, kHiddenPerTask, thread);
        for (int64_t t = 0; t < num_tokens; ++t) {
            float* out = layer.down.strips ? gate + t * kHiddenPerTask : hidden_.data() + t * layer.mlp_width + first;
            kernels_.geglu(gate + t * kHiddenPerTask, up + t * kHiddenPerTask, width, out);
        }
        if (layer.down.strips)
            kernels_.quantize_rows(gate, kHiddenPerTask, num_tokens, width, 0, group, hidden.quantized);
    });
    matmul(hidden, {{layer.down, branch_.data()}});
    add_branch(layer.gain_after_mlp, num_tokens);
}

// Norms and rotates queries and keys, then appends keys and values to the cache, where attention reads them back.
void CpuStep::rotate_and_store(const CpuAttention& attention, const StepBatch& batch) {
    const AttentionSpec& spec = attention.spec;
    const PagedKvGroup& group = plan_.paged[attention.place.group_index];
    const std::vector<int32_t>& table = batch.block_table[attention.place.group_index];
    int64_t query_width = spec.num_query_heads * spec.head_dim, kv_width = spec.num_kv_heads * spec.head_dim;
    int64_t pairs = static_cast<int64_t>(spec.rope.inverse_frequencies.size());
    KvPages kv_pages = pages(attention);
    for_tokens(batch.num_tokens(), [&](int64_t first, int64_t count) {
        for (int64_t t = first; t < first + count; ++t) {
            float* query = queries_.data() + t * query_width;
            float* key = keys_.data() + t * kv_width;
            const float* cos = cos_[attention.rope_index].data() + t * pairs;
            const float* sin = sin_[attention.rope_index].data() + t * pairs;
            if (attention.query_gain) {
                float epsilon = model_.spec.norm_epsilon;
                kernels_.rms_norm(query, attention.query_gain->data(), epsilon, spec.num_query_heads, spec.head_dim,
                                  query);
                kernels_.rms_norm(key, attention.key_gain->data(), epsilon, spec.num_kv_heads, spec.head_dim, key);
            }
            kernels_.rope(query, cos, sin, 1, spec.num_query_heads, spec.head_dim, pairs);
            kernels_.rope(key, cos, sin, 1, spec.num_kv_heads, spec.head_dim, pairs);
            auto after = std::upper_bound(batch.first_token.begin(), batch.first_token.end(), static_cast<int32_t>(t));
            int64_t sequence = after - batch.first_token.begin() - 1;
            int64_t position = batch.positions[t];
            int64_t column = position / kPageTokens % group.table_width;
            kernels_.write_kv(kv_pages, table[sequence * group.table_width + column], position % kPageTokens, key,
                              values_.data() + t * kv_width);
        }
    });
}

void CpuStep::attend(const CpuAttention& attention, const StepBatch& batch) {
    const AttentionSpec& spec = attention.spec;
    const PagedKvGroup& group = plan_.paged[attention.place.group_index];
    int64_t query_width = spec.num_query_heads * spec.head_dim;
    int64_t group_heads = spec.num_query_heads / spec.num_kv_heads;
    AttentionTask task;
    task.query_stride = task.out_stride = query_width;
    task.group_heads = group_heads;
    task.pages = pages(attention);
    task.table_width = group.table_width;
    task.query_scale = spec.query_scale;
    task.score_softcap = spec.score_softcap;
    task.window_keys = spec.window_keys;
    const int64_t most_queries = kernels_.attention_queries(group_heads);
    tasks_.clear();
    for (int64_t s = 0; s < batch.num_sequences(); ++s) {
        task.block_table = batch.block_table[attention.place.group_index].data() + s * group.table_width;
        for (int64_t first = batch.first_token[s]; first < batch.first_token[s + 1]; first += most_queries) {
            task.num_queries = std::min(most_queries, batch.first_token[s + 1] - first);
            task.first_position = batch.positions[first];
            for (task.kv_head = 0; task.kv_head < spec.num_kv_heads; ++task.kv_head) {
                int64_t offset = first * query_width + task.kv_head * group_heads * spec.head_dim;
                task.queries = queries_.data() + offset;
                task.out = attention_.data() + offset;
                tasks_.push_back(task);
            }
        }
    }
    attention_run_->run(tasks_, threads_);
}

void CpuStep::project_logits(const StepBatch& batch, std::span<float> logits) {
    int64_t width = model_.spec.model_width, num_rows = batch.num_logits();
    if (num_rows == 0) return;
    for (int64_t row = 0; row < num_rows; ++row)
        kernels_.rms_norm(residual_.data() + batch.logits_token[row] * width, model_.final_gain.data(),
                          model_.spec.norm_epsilon, 1, width, normed_.data() + row * width);
    matmul(quantized(normed_.data(), width, num_rows), {{model_.embedding, logits.data()}});
}

void CpuStep::matmul(const Input& input, std::initializer_list<MatmulJob> jobs) {
    int64_t num_strips = 0, num_tasks = 0;
    for (const MatmulJob& job : jobs) num_strips += job.weight.num_strips();
    const int64_t pairs = num_strips / (kTasksPerThread * threads_.num_threads()) / 2;
    const int64_t at_once = std::clamp<int64_t>(2 * pairs, 1, kMostStripsAtOnce);
    for (const MatmulJob& job : jobs) num_tasks += divide_up(job.weight.num_strips(), at_once);
    threads_.parallel_for(num_tasks, [&](int64_t task, int thread) {
        for (const MatmulJob& job : jobs) {
            const int64_t tasks = divide_up(job.weight.num_strips(), at_once), strip = task * at_once;
            if (task < tasks)
                return matmul_strips(job.weight, strip, std::min(at_once, job.weight.num_strips() - strip), input,
                                     job.out + strip * kStripRows, job.weight.rows(), thread);
            task -= tasks;
        }
    });
}

void CpuStep::matmul_strips(const Matrix& weight, int64_t first_strip, int64_t num_strips, const Input& input,
                            float* out, int64_t out_stride, int thread_index) {
    const int64_t first = first_strip * kStripRows, end = std::min(first + num_strips * kStripRows, weight.rows());
    if (weight.strips)
        kernels_.int8_matmul(*weight.strips, first_strip, num_strips, input.quantized, input.num_tokens, out,
                             out_stride, scratch(thread_index));
    else
        kernels_.matmul(weight.stored, first, end, input.rows, input.num_tokens, out - first, out_stride,
                        scratch(thread_index));
    if (weight.bias)
        for (int64_t t = 0; t < input.num_tokens; ++t)
            kernels_.add(weight.bias->data() + first, end - first, out + t * out_stride);
}

void CpuStep::add_branch(const std::optional<Gain>& gain, int64_t num_tokens) {
    int64_t width = model_.spec.model_width;
    for_tokens(num_tokens, [&](int64_t first, int64_t count) {
        const float* branch = branch_.data() + first * width;
        float* residual = residual_.data() + first * width;
        if (gain)
            kernels_.rms_norm_add(branch, gain->data(), model_.spec.norm_epsilon, count, width, residual);
        else
            kernels_.add(branch, count * width, residual);
    });
}

CpuStep::Input CpuStep::normalized(const Gain& gain, int64_t num_tokens) {
    int64_t width = model_.spec.model_width;
    const Input input{normed_.data(), quantized_.rows(num_tokens), num_tokens};
    for_tokens(num_tokens, [&](int64_t first, int64_t count) {
        float* rows = normed_.data() + first * width;
        kernels_.rms_norm(residual_.data() + first * width, gain.data(), model_.spec.norm_epsilon, count, width, rows);
        if (quantizes_) kernels_.quantize_rows(rows, width, count, width, first, 0, input.quantized);
    });
    return input;
}

CpuStep::Input CpuStep::quantized(const float* rows, int64_t cols, int64_t num_tokens) {
    const Input input{rows, quantized_.rows(num_tokens), num_tokens};
    if (quantizes_)
        for_tokens(num_tokens, [&](int64_t first, int64_t count) {
            kernels_.quantize_rows(rows + first * cols, cols, count, cols, first, 0, input.quantized);
        });
    return input;
}

void CpuStep::for_tokens(int64_t num_tokens, FunctionRef<void(int64_t first, int64_t count)> body) {
    threads_.parallel_for(divide_up(num_tokens, kTokensPerTask), [&](int64_t task, int) {
        int64_t first = task * kTokensPerTask;
        body(first, std::min(kTokensPerTask, num_tokens - first));
    });
}

KvPages CpuStep::pages(const CpuAttention& attention) {
    const PagedKvGroup& group = plan_.paged[attention.place.group_index];
    int64_t layer_bytes = group.num_blocks * page_bytes(group, options_.kv_type);
    std::byte* data = cache_[attention.place.group_index].data();
    return {data + attention.place.group_layer * layer_bytes, options_.kv_type, group.num_kv_heads, group.head_dim,
            kv_page_bytes(options_.kv_type, group.head_dim)};
}

}  // namespace gemma2_fast
