#include "cuda/attention_layer.h"

#include <algorithm>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kProgramsPerProcessor = 2;  // of decode attention: enough to keep memory busy
constexpr float kWidestCap = 55;              // as in triton_kernels/attention_common.py, which says why

}  // namespace

SplitScratch SplitScratch::reserve(Arena& arena, int64_t most_sequences, int64_t most_kv_heads, int64_t rows,
                                   int64_t widest_head, int64_t num_multiprocessors) {
    const int64_t pairs = most_sequences * most_kv_heads;
    const int64_t filling = kProgramsPerProcessor * num_multiprocessors, programs = std::max(pairs, filling);
    return {.parts = arena.reserve(programs * rows * widest_head * kF32Bytes),
            .part_sums = arena.reserve(programs * 2 * rows * kF32Bytes),
            .arrivals = arena.reserve(pairs * kI32Bytes),
            .num_programs = filling};
}

AttentionLayer::AttentionLayer(const AttentionSpec& spec, const std::string& prefix, int64_t model_width,
                               int64_t page_tokens, int64_t most_tokens, KernelSet& kernels, DeviceWeights& weights)
    : spec_(spec),
      qkv_(kernels,
           weights.matrix({{prefix + "query", spec.num_query_heads * spec.head_dim},
                           {prefix + "key", spec.num_kv_heads * spec.head_dim},
                           {prefix + "value", spec.num_kv_heads * spec.head_dim}},
                          model_width),
           ProductKind::kPlain, most_tokens),
      output_(
          kernels,
          weights.matrix({{prefix + "output", model_width}}, spec.num_query_heads * spec.head_dim, spec.output_bias),
          ProductKind::kPlain, most_tokens) {
    if (spec.score_softcap.value_or(0) > kWidestCap)
        throw BackendError(prefix + "score_softcap " + std::to_string(*spec.score_softcap) +
                           ": GPU kernels compute caps up to " + std::to_string(kWidestCap) + "; use backend=\"cpu\"");
    if (spec.qk_norm) {
        query_gain_ = weights.vector(prefix + "query_norm", spec.head_dim);
        key_gain_ = weights.vector(prefix + "key_norm", spec.head_dim);
    }
    const KernelSet::Constants head{{"HEAD_DIM", spec.head_dim}, {"PAGE", page_tokens}};
    KernelSet::Constants turned = head, attention = head;
    turned.insert({{"NORMED", spec.qk_norm}, {"PAIRS", spec.rope.inverse_frequencies.size()}});
    attention.insert({{"CAPPED", spec.score_softcap.has_value()},
                      {"WINDOWED", spec.window_keys.has_value()},
                      {"GROUP", spec.num_query_heads / spec.num_kv_heads}});
    rope_ = &kernels.find("rope", turned);
    decode_ = kernels.find_all("attention_decode", attention);
    std::ranges::sort(decode_, {}, [](const Kernel* kernel) { return kernel->constant("ROWS"); });
    prefill_ = &kernels.find("attention_prefill", attention);
}

void AttentionLayer::join(std::size_t group_index, int64_t table_width, Arena::Slice pages, RopeTables rope) {
    group_index_ = group_index;
    table_width_ = table_width;
    pages_ = pages;
    rope_tables_ = rope;
}

QueryRoom AttentionLayer::query_room() const {
    const int64_t group = prefill_->constant("GROUP");
    return {.tile = prefill_->constant("TILE") / group, .split = decode_rows() / group};
}

void AttentionLayer::enqueue(const StepContext& step, const SplitScratch& scratch, float norm_epsilon) const {
    const int64_t num_tokens = step.shape.num_tokens;
    qkv_.launch(step.stream, step.arena, step.at(step.rows.normed), step.at(step.rows.mixed), num_tokens);
    rotate_and_store(step, norm_epsilon);
    attend(step, scratch);
    output_.launch(step.stream, step.arena, step.at(step.rows.attended), step.at(step.rows.branch), num_tokens);
}

void AttentionLayer::rotate_and_store(const StepContext& step, float norm_epsilon) const {
    const CUdeviceptr cos = step.at(rope_tables_.cos);
    rope_->launch(step.stream, {.x = step.shape.num_tokens, .y = spec_.num_query_heads + 2 * spec_.num_kv_heads},
                  {{"qkv", step.at(step.rows.mixed)},
                   {"positions", step.inputs.positions},
                   {"token_sequence", step.inputs.token_sequence},
                   {"cos", cos},
                   {"sin", step.at(rope_tables_.sin)},
                   {"query_gain", query_gain_ ? step.at(*query_gain_) : cos},
                   {"key_gain", key_gain_ ? step.at(*key_gain_) : cos},
                   {"pages", step.at(pages_)},
                   {"num_query_heads", i32(spec_.num_query_heads)},
                   {"num_kv_heads", i32(spec_.num_kv_heads)},
                   {"block_table", step.inputs.block_table[group_index_]},
                   {"table_width", i32(table_width_)},
                   {"epsilon", norm_epsilon}});
}

void AttentionLayer::attend(const StepContext& step, const SplitScratch& scratch) const {
    const std::vector<KernelArgument> arguments{
        {"queries", step.at(step.rows.mixed)},
        {"pages", step.at(pages_)},
        {"num_kv_heads", i32(spec_.num_kv_heads)},
        {"block_table", step.inputs.block_table[group_index_]},
        {"table_width", i32(table_width_)},
        {"first_token", step.inputs.first_token},
        {"context_tokens", step.inputs.context_tokens},
        {"out", step.at(step.rows.attended)},
        {"query_stride", i32(mixed_width())},
        {"out_stride", i32(attended_width())},
        {"scale", spec_.query_scale},
        {"cap", spec_.score_softcap.value_or(1.0f)},
        {"window", i32(spec_.window_keys.value_or(0))},
        {"tiles", step.inputs.tiles},
        {"parts", step.at(scratch.parts)},
        {"part_sums", step.at(scratch.part_sums)},
        {"arrivals", step.at(scratch.arrivals)},
    };
    const SplitSequences& split = step.shape.split;
    if (split.number > 0)
        decode_kernel(split.queries)
            .launch(step.stream, {.x = num_splits(split, scratch), .y = spec_.num_kv_heads, .z = split.number},
                    arguments);
    if (step.shape.num_tiles > 0)
        prefill_->launch(step.stream, {.x = step.shape.num_tiles, .y = spec_.num_kv_heads}, arguments);
}

// The one with fewest rows that has room for so many queries of a sequence; query_room promised that there is one.
const Kernel& AttentionLayer::decode_kernel(int64_t num_queries) const {
    const int64_t rows = num_queries * prefill_->constant("GROUP");
    return **std::ranges::find_if(decode_, [&](const Kernel* kernel) { return kernel->constant("ROWS") >= rows; });
}

// As many as fill the processors, but none that would have less than a block of keys, or whose part would be larger
// than the keys and values that it is the sum of.
int64_t AttentionLayer::num_splits(const SplitSequences& split, const SplitScratch& scratch) const {
    const int64_t filling = scratch.num_programs / (spec_.num_kv_heads * split.number);
    const int64_t keys = std::min(split.keys, spec_.window_keys.value_or(split.keys));
    const Kernel& kernel = decode_kernel(split.queries);
    const int64_t fewest_keys = std::max(kernel.constant("BLOCK"), kernel.constant("ROWS"));
    return std::clamp<int64_t>(filling, 1, divide_up(keys, fewest_keys));
}

}  // namespace gemma2_fast
