#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/arena.h"
#include "cuda/cuda_layers.h"
#include "cuda/kernel.h"
#include "cuda/step_inputs.h"
#include "cuda/uploader.h"
#include "runtime/cache_plan.h"
#include "runtime/check_batch.h"
#include "runtime/model_step.h"

namespace gemma2_fast {

// Runs a model on a GPU: owns weights, cache pages and activations, one allocation made up front. A step in which every
// sequence has one new token is captured once a shape and replayed; others are launched kernel by kernel.
class GraphStep final : public ModelStep {
  public:
    struct Options {
        StepLimits limits;
        int64_t max_sequences = 0;
        int64_t max_seq_len = 0;
        bool captures = true;  // false: every step is launched kernel by kernel, for tests
    };

    GraphStep(std::shared_ptr<const Device> device, const ModelSpec& spec, const CachePlan& plan,
              const std::map<std::string, DeviceFormat>& formats, std::vector<KernelImage> kernels,
              const Options& options);
    ~GraphStep() override;

    // Copies one part of a tensor to its place. Throws Error unless the model has it, of that size. finish_upload
    // throws where one is missing; nothing may run before.
    void upload(const std::string& name, const std::string& part, std::span<const std::byte> bytes);
    void finish_upload();

    void run(const StepBatch& batch, std::span<float> logits) override;
    bool can_choose() const override { return true; }
    void choose(const StepBatch& batch, std::span<const TokenChoice> choices, std::span<int32_t> tokens) override;
    void copy_logits(std::span<float> logits) override;

    int64_t num_device_bytes() const { return arena_.num_bytes(); }
    int64_t num_graphs() const { return static_cast<int64_t>(graphs_.size()); }
    void poison_cache();  // fills every page with NaN, for tests

  private:
    enum class Product { kPlain, kGated, kHead };
    // Of a matrix product, by the number of tokens.
    struct ProductKernels {
        const Kernel* one = nullptr;
        const Kernel* few = nullptr;
        const Kernel* many = nullptr;  // the head has none
    };
    struct LayerKernels {
        const Kernel *rope = nullptr, *decode = nullptr, *prefill = nullptr;
        ProductKernels qkv, output, gated;
        const Kernel* geglu = nullptr;  // after a gated product of many tokens, which leaves gate and up apart
        ProductKernels down;
        const Kernel *after_mixer = nullptr, *after_mlp = nullptr;
    };
    struct Rope {
        Arena::Slice cos, sin;  // [max_seq_len, R / 2] float32
    };

    void find_kernels();
    const Kernel& attention_kernel(const std::string& op, const AttentionSpec& spec);
    ProductKernels product_kernels(DeviceFormat format, Product product);
    int64_t queries_per_tile();
    int64_t largest_step() const;  // in tokens, what decode steps are filled up with included
    int64_t largest_num_logits() const;
    void reserve_activations();
    void upload_rope_tables();

    void start(const StepBatch& batch, std::span<const TokenChoice> choices, const StepShape& shape);
    void replay(const StepShape& shape);
    void enqueue(const StepShape& shape);
    void mix(std::size_t index, const StepShape& shape, const StepInputs::Addresses& inputs);
    void mlp(std::size_t index, const StepShape& shape);
    void rotate_and_store(const CudaAttention& attention, const Kernel& kernel, const StepShape& shape,
                          const StepInputs::Addresses& inputs);
    void attend(const CudaAttention& attention, const LayerKernels& kernels, const StepShape& shape,
                const StepInputs::Addresses& inputs);
    int64_t num_splits(const AttentionSpec& spec, const Kernel& kernel, const StepShape& shape) const;
    // residual += norm(branch, after), then normed = norm(residual, before).
    void add_branch(const Kernel& kernel, const std::optional<Arena::Slice>& after, const Arena::Slice& before,
                    int64_t num_tokens);
    void project_logits(const StepShape& shape, const StepInputs::Addresses& inputs);
    void choose_tokens(const StepShape& shape, const StepInputs::Addresses& inputs);
    void product(const ProductKernels& kernels, const DeviceMatrix& matrix, const Arena::Slice& x,
                 const Arena::Slice& out, int64_t num_tokens);
    void stream_matrix(const Kernel& kernel, const DeviceMatrix& matrix, int64_t out_rows, CUdeviceptr x,
                       CUdeviceptr row_index, CUdeviceptr out, int64_t num_tokens);
    CUdeviceptr pages(const CudaAttention& attention) const;
    int64_t layer_bytes(const PagedKvGroup& group) const;

    std::shared_ptr<const Device> device_;
    Options options_;
    CachePlan plan_;
    Arena arena_;
    CudaModel model_;
    KernelSet kernels_;
    StepInputs inputs_;
    Stream stream_;
    std::unique_ptr<Uploader> uploader_;  // until everything is there
    std::set<std::pair<std::string, std::string>> uploaded_;

    const Kernel* embed_ = nullptr;
    const Kernel* first_norm_ = nullptr;
    ProductKernels head_;
    const Kernel *sample_scan_ = nullptr, *sample_weigh_ = nullptr, *sample_draw_ = nullptr;
    std::vector<LayerKernels> layer_kernels_;

    std::vector<Arena::Slice> cache_;  // a paged group: [layers, blocks and one that is nobody's, 2, K, P, D] bfloat16
    std::vector<Rope> ropes_;
    // Activations of a step, T rows each. The residual and logits are float32, all else bfloat16.
    Arena::Slice residual_, normed_, branch_;    // [T, E]
    Arena::Slice qkv_, attended_;                // [T, H + 2 K, D], [T, H, D]
    Arena::Slice gate_up_, hidden_;              // [T, 2 F], [T, F]
    Arena::Slice logits_;                        // [L, V]
    Arena::Slice parts_, part_sums_, arrivals_;  // of the splits of attention
    Arena::Slice firsts_, best_, sums_;          // of the blocks of the vocabulary, [L, blocks] and more
    Arena::Slice tokens_;                        // [L]
    PinnedMemory chosen_;                        // the same on the host

    std::map<StepShape, std::unique_ptr<Graph>> graphs_;
};

}  // namespace gemma2_fast
