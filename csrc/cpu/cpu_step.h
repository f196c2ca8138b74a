#pragma once

#include <initializer_list>
#include <memory>
#include <span>
#include <vector>

#include "base/aligned_buffer.h"
#include "base/thread_pool.h"
#include "cpu/attention_run.h"
#include "cpu/cpu_layers.h"
#include "cpu/kernels.h"
#include "cpu/quantized_buffer.h"
#include "cpu/recurrent_mixer.h"
#include "runtime/cache_plan.h"
#include "runtime/model_step.h"

namespace gemma2_fast {

// Runs a model on the CPU: owns the cache and the activations of one step, all allocated up front.
class CpuStep final : public ModelStep {
  public:
    struct Options {
        Activations activations = Activations::kF32;
        KvType kv_type = KvType::kF32;
        InstructionSet instruction_set = InstructionSet::kScalar;
        int num_threads = 1;
        int64_t max_step_tokens = 0;
        int64_t max_logits_rows = 0;
    };

    CpuStep(const ModelSpec& spec, ModelWeights weights, const CachePlan& plan, const Options& options);

    void run(const StepBatch& batch, std::span<float> logits) override;

    // Fills every page and state with NaN, so that a read of what nobody wrote shows in the logits.
    void poison_cache();

  private:
    // What a matmul reads: float32 rows, and the same quantised where a weight wants that.
    struct Input {
        const float* rows;  // [T, cols]
        QuantizedRows quantized;
        int64_t num_tokens;
    };
    struct MatmulJob {
        const Matrix& weight;
        float* out;  // [T, weight rows]
    };

    void embed(const StepBatch& batch);
    void compute_rope_tables(const StepBatch& batch);
    void mix(const CpuLayer& layer, const StepBatch& batch);
    void mix(const CpuAttention& attention, const Input& input, const StepBatch& batch);
    void mix(const CpuRecurrent& recurrent, const Input& input, const StepBatch& batch);
    void rotate_and_store(const CpuAttention& attention, const StepBatch& batch);
    void attend(const CpuAttention& attention, const StepBatch& batch);
    void mlp(const CpuLayer& layer, int64_t num_tokens);
    void project_logits(const StepBatch& batch, std::span<float> logits);

    // One parallel region over the strips of all jobs.
    void matmul(const Input& input, std::initializer_list<MatmulJob> jobs);
    // Rows of some strips for every token: out[t * out_stride] is the first.
    void matmul_strips(const Matrix& weight, int64_t first_strip, int64_t num_strips, const Input& input, float* out,
                       int64_t out_stride, int thread_index);
    void add_branch(const std::optional<Gain>& gain, int64_t num_tokens);  // residual_ += norm(branch_)
    Input normalized(const Gain& gain, int64_t num_tokens);                // norm(residual_)
    Input quantized(const float* rows, int64_t cols, int64_t num_tokens);
    void for_tokens(int64_t num_tokens, FunctionRef<void(int64_t first, int64_t count)> body);
    KvPages pages(const CpuAttention& attention);
    float* scratch(int thread_index) { return scratch_.data() + thread_index * scratch_floats_; }

    const Kernels& kernels_;
    Options options_;
    CachePlan plan_;
    ThreadPool threads_;
    CpuModel model_;
    std::vector<AlignedBuffer<std::byte>> cache_;  // per paged group: [layers, blocks, K] pages

    // Activations of a step, T rows each; E model, Q = H * D, KV = K * D, F MLP width.
    AlignedBuffer<float> residual_, normed_, branch_;           // [T, E]
    AlignedBuffer<float> queries_, keys_, values_, attention_;  // [T, Q], [T, KV], [T, KV], [T, Q]
    AlignedBuffer<float> hidden_;                               // [T, F], for a down matrix that is not quantised
    QuantizedBuffer quantized_, quantized_hidden_;              // [T, max(E, Q, R)], [T, F]
    std::vector<AlignedBuffer<float>> cos_, sin_;               // per rope: [T, pairs]
    std::vector<AttentionTask> tasks_;
    std::optional<AttentionRun> attention_run_;
    std::optional<RecurrentMixer> recurrent_mixer_;
    bool quantizes_ = false;  // some matrix wants int8 activations
    int64_t matmul_scratch_floats_ = 0, scratch_floats_ = 0;
    AlignedBuffer<float> scratch_;  // [threads, scratch_floats]
};

}  // namespace gemma2_fast
