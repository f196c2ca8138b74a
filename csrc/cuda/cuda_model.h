#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <variant>
#include <vector>

#include "cuda/attention_layer.h"
#include "cuda/device_weights.h"
#include "cuda/gated_mlp.h"
#include "cuda/launch_sizes.h"
#include "cuda/recurrent_layer.h"
#include "cuda/step_context.h"
#include "runtime/cache_plan.h"
#include "spec/model_spec.h"

namespace gemma2_fast {

struct CudaLayer {
    std::variant<AttentionLayer, RecurrentLayer> mixer;
    GatedMlp mlp;
    Arena::Slice gain_before_mixer, gain_before_mlp;  // norms: w as stored, [E] float32
    std::optional<Arena::Slice> gain_after_mixer, gain_after_mlp;
    const Kernel *norm_after_mixer, *norm_after_mlp;  // with the sum and the norm that follows
};

// A model prepared for the device: places of its weights, states and rows, all of one arena, and the kernels of every
// layer. Throws BackendError for what has no kernel.
class CudaModel {
  public:
    CudaModel(const ModelSpec& spec, const CachePlan& plan, const StepSizes& sizes, int num_multiprocessors,
              KernelSet& kernels, DeviceWeights& weights, Arena& arena);

    void copy_states(std::span<const StateCopy> copies, const Arena& arena, Stream& stream) const;
    // Puts a whole forward pass on the step's stream.
    void enqueue(const StepContext& step) const;

    struct RopeTable {
        RopeSpec spec;
        RopeTables tables;
    };
    const std::vector<RopeTable>& ropes() const { return ropes_; }
    const std::vector<Arena::Slice>& cache() const { return cache_; }  // pages and states
    const SplitScratch& split_scratch() const { return split_scratch_; }
    const StepRows& rows() const { return rows_; }
    QueryRoom query_room() const;

  private:
    int64_t norm_block() const;
    CudaLayer load_layer(std::size_t index, int64_t page_tokens, KernelSet& kernels, DeviceWeights& weights) const;
    void reserve_cache(const CachePlan& plan, Arena& arena);
    void reserve_rows(int num_multiprocessors, Arena& arena);
    RopeTables tables_of(const RopeSpec& rope, Arena& arena);

    void embed(const StepContext& step) const;
    void add_branch(const StepContext& step, const Kernel& norm, const std::optional<Arena::Slice>& after,
                    const Arena::Slice& before) const;
    void project_logits(const StepContext& step) const;

    ModelSpec spec_;
    StepSizes sizes_;
    Product head_;
    Arena::Slice final_gain_;
    const Kernel *embed_, *first_norm_;
    std::vector<CudaLayer> layers_;
    std::vector<RopeTable> ropes_;
    std::vector<Arena::Slice> cache_;
    StepRows rows_;
    SplitScratch split_scratch_;
    RecurrentScratch recurrent_scratch_;
};

}  // namespace gemma2_fast
