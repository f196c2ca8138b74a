#pragma once

#include <array>
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

#include "cuda/cuda_model.h"
#include "cuda/kernel.h"
#include "cuda/step_inputs.h"
#include "cuda/token_chooser.h"
#include "cuda/uploader.h"
#include "runtime/check_batch.h"
#include "runtime/model_step.h"

namespace gemma2_fast {

// Runs a model on a GPU: owns weights, cache and rows, one allocation made up front. A step in which every sequence has
// one new token is captured once a shape and replayed; others are launched kernel by kernel.
class GraphStep final : public ModelStep {
  public:
    struct Options {
        StepLimits limits;
        int64_t max_sequences = 0;
        int64_t max_seq_len = 0;
        bool captures = true;   // false: every step is launched kernel by kernel, for tests
        bool allocates = true;  // false: nothing can run, and no memory but for kernels is taken: to ask how much it is
    };

    GraphStep(std::shared_ptr<const Device> device, const ModelSpec& spec, const CachePlan& plan,
              std::map<std::string, DeviceFormat> formats, std::vector<KernelImage> kernels, const Options& options);
    ~GraphStep() override;

    // Copies one part of a tensor to its place. Throws Error unless the model has it, of that size. finish_upload
    // throws where one is missing; nothing may run before.
    void upload(const std::string& name, const std::string& part, std::span<const std::byte> bytes);
    void finish_upload();
    const std::set<std::string>& float32_tensors() const { return weights_.vectors(); }  // all others: matrices

    void run(const StepBatch& batch, std::span<float> logits) override;
    bool can_choose() const override { return true; }
    bool always_chooses(const SamplingParams& params) const override { return chooser_.always_chooses(params); }
    void start(const StepBatch& batch, std::span<const TokenChoice> choices) override;
    void finish(std::span<int32_t> tokens) override;
    void copy_logits(std::span<float> logits) override;

    int64_t num_device_bytes() const { return arena_.num_bytes(); }
    int64_t num_weight_bytes() const { return weights_.num_bytes(); }  // of them
    int64_t num_graphs() const { return static_cast<int64_t>(graphs_.size()); }
    void poison_cache();  // fills pages and states with NaN, for tests

  private:
    // Where the host has what one step reads and gives, while the step before is not done with the other side.
    struct Side {
        Side(const Device& device, int64_t max_rows)
            : tokens(device, max_rows * kI32Bytes, "chosen tokens"), done(device) {}
        PinnedMemory tokens;
        Event done;
        int64_t num_rows = 0;
    };

    void allocate();
    void upload_rope_tables();
    void check(const StepBatch& batch, int64_t num_logit_values) const;
    void put_on_stream(const StepBatch& batch, std::span<const TokenChoice> choices);
    void replay(const StepShape& shape);
    void enqueue(const StepShape& shape);
    void drain();

    std::shared_ptr<const Device> device_;
    std::optional<DeviceGuard> lifetime_guard_;  // while the members below are made, and while they are destroyed
    Options options_;
    CachePlan plan_;
    Arena arena_;
    DeviceWeights weights_;
    KernelSet kernels_;
    CudaModel model_;
    TokenChooser chooser_;
    StepInputs inputs_;
    Stream stream_;
    std::array<Side, 2> sides_;
    int next_side_ = 0;
    int num_started_ = 0;                 // and not finished
    std::unique_ptr<Uploader> uploader_;  // until everything is there
    std::set<std::pair<std::string, std::string>> uploaded_;
    std::map<StepShape, std::unique_ptr<Graph>> graphs_;
};

}  // namespace gemma2_fast
