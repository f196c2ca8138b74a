// A small random model on the CPU backend under the decode loop: eight clients at once, too few cache blocks for all of
// them, some giving up half-way. Every finished sequence must have the tokens it has alone on one thread.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu_step.h"
#include "runtime/decode_loop.h"

using namespace gemma2_fast;

namespace {

constexpr int64_t kWidth = 64, kHeads = 4, kKvHeads = 2, kHeadDim = 16, kMlpWidth = 96, kVocab = 211;
constexpr int64_t kWindowKeys = 48, kMaxSeqLen = 256, kMaxStepTokens = 40;
constexpr int64_t kNewTokens = 60;
constexpr int kClients = 8, kRounds = 2;

ModelSpec small_spec() {
    ModelSpec spec;
    spec.model_width = kWidth;
    spec.vocab_size = kVocab;
    spec.embedding_scale = 8;
    spec.norm_epsilon = 1e-6f;
    spec.final_softcap = 30.0f;
    for (int64_t layer = 0; layer < 4; ++layer) {
        AttentionSpec attention;
        attention.num_query_heads = kHeads;
        attention.num_kv_heads = kKvHeads;
        attention.head_dim = kHeadDim;
        attention.query_scale = 0.25f;
        attention.score_softcap = 50.0f;
        if (layer % 2 == 0) attention.window_keys = kWindowKeys;
        for (int64_t pair = 0; pair < kHeadDim / 2; ++pair)
            attention.rope.inverse_frequencies.push_back(1.0f / static_cast<float>(1 << pair));
        spec.layers.push_back({attention, kMlpWidth, true, true});
    }
    return spec;
}

ModelWeights random_weights() {
    auto storage = std::make_shared<std::map<std::string, std::vector<float>>>();
    ModelWeights weights;
    std::mt19937 random(7);
    auto add = [&](const std::string& name, int64_t rows, int64_t cols, float spread) {
        std::normal_distribution<float> normal(0, spread);
        std::vector<float>& values = (*storage)[name];
        values.resize(static_cast<std::size_t>(rows * cols));
        for (float& value : values) value = normal(random);
        weights.tensors[name] = {WeightType::kF32, rows, cols, reinterpret_cast<const std::byte*>(values.data())};
    };
    add("embedding", kVocab, kWidth, 0.1f);
    for (int layer = 0; layer < 4; ++layer) {
        std::string prefix = "layers." + std::to_string(layer) + ".";
        for (const char* norm : {"norm_before_mixer", "norm_after_mixer", "norm_before_mlp", "norm_after_mlp"})
            add(prefix + norm, 1, kWidth, 0.3f);
        add(prefix + "attention.query", kHeads * kHeadDim, kWidth, 0.3f);
        add(prefix + "attention.key", kKvHeads * kHeadDim, kWidth, 0.3f);
        add(prefix + "attention.value", kKvHeads * kHeadDim, kWidth, 0.2f);
        add(prefix + "attention.output", kWidth, kHeads * kHeadDim, 0.2f);
        add(prefix + "mlp.gate", kMlpWidth, kWidth, 0.2f);
        add(prefix + "mlp.up", kMlpWidth, kWidth, 0.2f);
        add(prefix + "mlp.down", kWidth, kMlpWidth, 0.2f);
    }
    add("final_norm", 1, kWidth, 2.0f);
    weights.owner = storage;
    return weights;
}

// Blocks for `num_sequences` sequences of full length.
CachePlan cache_for(int64_t num_sequences) {
    int64_t whole = kMaxSeqLen / kPageTokens;
    int64_t ring = (kWindowKeys - 1 + kMaxStepTokens - 1 + kPageTokens - 1) / kPageTokens + 1;
    CachePlan plan;
    plan.page_tokens = kPageTokens;
    plan.paged.push_back({{0, 2}, kKvHeads, kHeadDim, kWindowKeys, ring * num_sequences, ring});
    plan.paged.push_back({{1, 3}, kKvHeads, kHeadDim, std::nullopt, whole * num_sequences, whole});
    return plan;
}

std::unique_ptr<DecodeLoop> start_loop(InstructionSet set, int num_threads, int64_t room_for) {
    CachePlan plan = cache_for(room_for);
    CpuStep::Options options{KvType::kF32, set, num_threads, kMaxStepTokens, kClients};
    auto step = std::make_shared<CpuStep>(small_spec(), random_weights(), plan, options);
    step->poison_cache();
    Limits limits{kClients, kMaxStepTokens, kMaxSeqLen, kClients, kVocab};
    return std::make_unique<DecodeLoop>(step, plan, limits);
}

Request request_of(int client) {
    Request request;
    std::mt19937 random(static_cast<unsigned>(client));
    for (int i = 0; i < 5 + 23 * client; ++i) request.token_ids.push_back(static_cast<int32_t>(random() % kVocab));
    request.sampling.max_tokens = kNewTokens;
    request.sampling.temperature = client % 2 ? 0.8f : 0.0f;
    request.sampling.seed = static_cast<uint64_t>(client);
    return request;
}

// The sequence's tokens, or fewer when the client gives up after `patience` of them.
std::vector<int32_t> collect(DecodeLoop& loop, int client, std::size_t patience) {
    int64_t id = loop.submit(request_of(client));
    std::vector<int32_t> tokens;
    while (true) {
        for (const TokenEvent& event : loop.wait(id, std::chrono::seconds(60))) {
            if (event.token_id) tokens.push_back(*event.token_id);
            if (event.finish_reason == FinishReason::kError) {
                std::printf("client %d: %s\n", client, event.message.value_or("no message").c_str());
                std::exit(1);
            }
            if (event.finish_reason) return tokens;
        }
        if (tokens.size() >= patience) loop.cancel(id);
    }
}

int count_differences(InstructionSet set) {
    std::vector<std::vector<int32_t>> alone;
    auto quiet_loop = start_loop(set, 1, 1);
    for (int client = 0; client < kClients; ++client) {
        alone.push_back(collect(*quiet_loop, client, kNewTokens));
        if (std::set<int32_t>(alone.back().begin(), alone.back().end()).size() < 15) {
            std::printf("client %d repeats itself: this model could not tell a wrong key from a right one\n", client);
            std::exit(1);
        }
    }

    auto loop = start_loop(set, 4, 2);
    int differences = 0;
    for (int round = 0; round < kRounds; ++round) {
        std::vector<std::vector<int32_t>> together(kClients);
        std::vector<std::thread> clients;
        for (int client = 0; client < kClients; ++client)
            clients.emplace_back([&, client] {
                bool gives_up = (client + round) % 4 == 3;
                together[client] = collect(*loop, client, gives_up ? 10 : kNewTokens);
            });
        for (std::thread& client : clients) client.join();
        for (int client = 0; client < kClients; ++client) {
            const std::vector<int32_t>& got = together[client];
            bool whole = (client + round) % 4 == 3 || got.size() == alone[client].size();
            if (!whole || !std::equal(got.begin(), got.end(), alone[client].begin())) ++differences;
        }
    }
    LoopStats stats = loop->stats();
    std::printf("%s: %d rounds of %d clients, %lld steps, %lld preemptions, %d sequences differ\n",
                std::string(instruction_set_name(set)).c_str(), kRounds, kClients,
                static_cast<long long>(stats.num_steps), static_cast<long long>(stats.num_preemptions), differences);
    return differences;
}

}  // namespace

int main() {
    int differences = 0;
    for (InstructionSet set : available_instruction_sets()) differences += count_differences(set);
    return differences == 0 ? 0 : 1;
}
