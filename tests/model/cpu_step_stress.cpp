// Eight concurrent streams over the CPU step of a small model, with threads of its own: every stream's tokens must
// equal those it has alone. A plain program so that it runs under ThreadSanitizer and AddressSanitizer without Python.

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu_step.h"
#include "runtime/decode_loop.h"

using namespace gemma2_fast;

namespace {

constexpr int64_t kVocab = 96, kWidth = 64, kHeadDim = 16, kHeads = 4, kKvHeads = 2, kMlp = 96, kWindow = 40;
constexpr int64_t kRecurrentWidth = 80, kGateBlocks = 2, kTaps = 4;
constexpr int kStreams = 8;
constexpr int64_t kMaxSeqLen = 160, kStepTokens = 48;

// Random weights, alive as long as the program.
class Weights {
  public:
    ModelWeights of(const ModelSpec& spec) {
        ModelWeights weights;
        add(weights, "embedding", kVocab, kWidth);
        add(weights, "final_norm", 1, kWidth);
        for (std::size_t i = 0; i < spec.layers.size(); ++i) {
            std::string prefix = "layers." + std::to_string(i) + ".";
            for (const char* norm : {"norm_before_mixer", "norm_after_mixer", "norm_before_mlp", "norm_after_mlp"})
                add(weights, prefix + norm, 1, kWidth);
            if (std::holds_alternative<AttentionSpec>(spec.layers[i].mixer))
                add_attention(weights, prefix + "attention.");
            else
                add_recurrent(weights, prefix + "recurrent.");
            add(weights, prefix + "mlp.gate", kMlp, kWidth);
            add(weights, prefix + "mlp.up", kMlp, kWidth);
            add(weights, prefix + "mlp.down", kWidth, kMlp);
        }
        return weights;
    }

  private:
    void add_attention(ModelWeights& weights, const std::string& prefix) {
        add(weights, prefix + "query", kHeads * kHeadDim, kWidth);
        add(weights, prefix + "key", kKvHeads * kHeadDim, kWidth);
        add(weights, prefix + "value", kKvHeads * kHeadDim, kWidth);
        add(weights, prefix + "output", kWidth, kHeads * kHeadDim);
    }

    void add_recurrent(ModelWeights& weights, const std::string& prefix) {
        for (const char* name : {"linear_x", "linear_y"}) {
            add(weights, prefix + name, kRecurrentWidth, kWidth);
            add(weights, prefix + name + "_bias", 1, kRecurrentWidth);
        }
        add(weights, prefix + "linear_out", kWidth, kRecurrentWidth);
        add(weights, prefix + "linear_out_bias", 1, kWidth);
        add(weights, prefix + "conv", kRecurrentWidth, kTaps);
        add(weights, prefix + "conv_bias", 1, kRecurrentWidth);
        add(weights, prefix + "decay", 1, kRecurrentWidth);
        for (const char* name : {"input_gate", "recurrence_gate"}) {
            add(weights, prefix + name, kRecurrentWidth, kRecurrentWidth / kGateBlocks);
            add(weights, prefix + name + "_bias", kGateBlocks, kRecurrentWidth / kGateBlocks);
        }
    }

    void add(ModelWeights& weights, const std::string& name, int64_t rows, int64_t cols) {
        std::normal_distribution<float> normal(0, 1 / std::sqrt(static_cast<float>(kWidth)));
        storage_.emplace_back(rows * cols);
        for (float& value : storage_.back()) value = normal(random_);
        const auto* data = reinterpret_cast<const std::byte*>(storage_.back().data());
        weights.tensors.emplace(name, WeightView{WeightType::kF32, rows, cols, data});
    }

    std::mt19937 random_{1};
    std::vector<std::vector<float>> storage_;
};

ModelSpec small_spec() {
    ModelSpec spec{kWidth, kVocab, 8.0f, 1e-6f, 30.0f, {}};
    for (int i = 0; i < 2; ++i) {
        AttentionSpec attention{kHeads, kKvHeads, kHeadDim, 0.25f, 50.0f, std::nullopt, false, false, {}};
        if (i == 0) attention.window_keys = kWindow;
        for (int j = 0; j < kHeadDim / 2; ++j)
            attention.rope.inverse_frequencies.push_back(std::pow(10000.0f, -2.0f * j / kHeadDim));
        spec.layers.push_back({attention, kMlp, false, true, true});
    }
    spec.layers.push_back({RecurrentSpec{kRecurrentWidth, kGateBlocks, kTaps}, kMlp, false, true, true});
    return spec;
}

// Room for about three of the eight sequences, so that some are preempted.
CachePlan small_plan() {
    CachePlan plan;
    plan.page_tokens = kPageTokens;
    plan.paged.push_back({{0}, kKvHeads, kHeadDim, kWindow, 9, 4});
    plan.paged.push_back({{1}, kKvHeads, kHeadDim, std::nullopt, 14, 5});
    plan.recurrent = {{2}, kRecurrentWidth, kTaps - 1, kStreams};
    return plan;
}

std::vector<int32_t> generate(DecodeLoop& loop, int stream) {
    Request request;
    for (int i = 0; i < 1 + stream * 13; ++i) request.token_ids.push_back((stream * 31 + i * 7) % kVocab);
    request.sampling.max_tokens = 40;
    request.sampling.temperature = 1.0f;
    request.sampling.seed = static_cast<uint64_t>(stream);
    const int64_t id = loop.submit(std::move(request));
    std::vector<int32_t> ids;
    while (true) {
        for (const TokenEvent& event : loop.wait(id, std::chrono::milliseconds(200))) {
            if (event.token_id) ids.push_back(*event.token_id);
            if (!event.finish_reason) continue;
            if (*event.finish_reason == FinishReason::kLength) return ids;
            std::fprintf(stderr, "cpu_step_stress: stream %d ended early: %s\n", stream,
                         event.message ? event.message->c_str() : "");
            std::abort();
        }
    }
}

}  // namespace

int main() {
    ModelSpec spec = small_spec();
    CachePlan plan = small_plan();
    Weights weights;
    ModelWeights views = weights.of(spec);
    const Limits limits{kStreams, kStepTokens, kMaxSeqLen, kStepTokens, kVocab, std::nullopt};
    for (InstructionSet set : available_instruction_sets()) {
        const CpuStep::Options options{.activations = Activations::kF32,
                                       .kv_type = KvType::kF32,
                                       .instruction_set = set,
                                       .num_threads = 3,
                                       .max_step_tokens = kStepTokens,
                                       .max_logits_rows = kStepTokens};
        auto step = std::make_shared<CpuStep>(spec, views, plan, options);
        step->poison_cache();
        DecodeLoop loop(step, plan, limits);
        std::vector<std::vector<int32_t>> alone, together(kStreams);
        for (int stream = 0; stream < kStreams; ++stream) alone.push_back(generate(loop, stream));
        std::vector<std::thread> threads;
        for (int stream = 0; stream < kStreams; ++stream)
            threads.emplace_back([&, stream] { together[stream] = generate(loop, stream); });
        for (std::thread& thread : threads) thread.join();
        for (int stream = 0; stream < kStreams; ++stream)
            if (together[stream] != alone[stream]) {
                std::fprintf(stderr, "cpu_step_stress: stream %d differs from its run alone\n", stream);
                return 1;
            }
        std::printf("cpu_step_stress: %s: %d streams equal their runs alone, %lld preemptions\n",
                    std::string(instruction_set_name(set)).c_str(), kStreams,
                    static_cast<long long>(loop.stats().num_preemptions));
    }
    return 0;
}
