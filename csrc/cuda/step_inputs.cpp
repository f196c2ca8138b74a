#include "cuda/step_inputs.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <numeric>
#include <utility>

#include "cuda/launch_sizes.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kAlignment = 4;          // integers in the 16 bytes that kernels may load at once
constexpr int64_t kFewestSplitKeys = 512;  // shapes of shorter contexts are one

bool is_decode(const StepBatch& batch) {
    return batch.num_tokens() == batch.num_sequences() && batch.num_logits() == batch.num_tokens();
}

int64_t num_new_tokens(const StepBatch& batch, int64_t sequence) {
    return batch.first_token[sequence + 1] - batch.first_token[sequence];
}

int64_t bound_of_keys(int64_t most) { return std::max(kFewestSplitKeys, power_of_two(most)); }

StepShape largest(const StepSizes& sizes, const QueryRoom& room) {
    return {.num_tokens = sizes.max_tokens,
            .num_sequences = sizes.max_sequences,
            .num_logits = sizes.max_logits,
            .split = {},
            .num_tiles = sizes.max_tokens / room.tile + sizes.max_sequences,
            .is_decode = false,
            .chooses = true};
}

}  // namespace

StepInputs::StepInputs(const Device& device, const CachePlan& plan, const StepSizes& sizes, int64_t vocab_size,
                       const QueryRoom& room, Arena& arena)
    : plan_(plan),
      vocab_size_(vocab_size),
      room_(room),
      block_(arena.reserve(layout(largest(sizes, room)).size * kI32Bytes)),
      host_{PinnedMemory(device, block_.num_bytes, "the inputs of a step"),
            PinnedMemory(device, block_.num_bytes, "the inputs of a step")} {}

StepShape StepInputs::shape(const StepBatch& batch, bool chooses) const {
    if (is_decode(batch)) {
        const int64_t count = power_of_two(batch.num_tokens());
        const int64_t keys = *std::ranges::max_element(batch.context_tokens) + 1;
        return {.num_tokens = count,
                .num_sequences = count,
                .num_logits = count,
                .split = {.number = count, .queries = 1, .keys = bound_of_keys(keys)},
                .num_tiles = 0,
                .is_decode = true,
                .chooses = chooses};
    }
    StepShape shape{.num_tokens = batch.num_tokens(),
                    .num_sequences = batch.num_sequences(),
                    .num_logits = batch.num_logits(),
                    .split = split_sequences(batch),
                    .num_tiles = 0,
                    .is_decode = false,
                    .chooses = chooses};
    for (int64_t s = shape.split.number; s < batch.num_sequences(); ++s)
        shape.num_tiles += divide_up(num_new_tokens(batch, s), room_.tile);
    return shape;
}

// Those that go on with few tokens, up to the first that does not: the scheduler puts those that decode first.
SplitSequences StepInputs::split_sequences(const StepBatch& batch) const {
    SplitSequences split;
    for (int64_t s = 0; s < batch.num_sequences(); ++s) {
        const int64_t queries = num_new_tokens(batch, s), context = batch.context_tokens[s];
        if (queries > room_.split || context == 0) break;
        split = {.number = s + 1,
                 .queries = std::max(split.queries, queries),
                 .keys = std::max(split.keys, bound_of_keys(context + queries))};
    }
    return split;
}

void StepInputs::fill(const StepBatch& batch, std::span<const TokenChoice> choices, const StepShape& shape, int side) {
    const Layout at = layout(shape);
    auto* block = reinterpret_cast<int32_t*>(host_[side].data());
    const auto put = [&](int64_t offset, const std::vector<int32_t>& values, int64_t count, int32_t filler) {
        int32_t* end = std::copy(values.begin(), values.end(), block + offset);
        std::fill(end, block + offset + count, filler);
    };
    put(at.token_ids, batch.token_ids, shape.num_tokens, 0);
    put(at.positions, batch.positions, shape.num_tokens, 0);
    put(at.first_token, batch.first_token, shape.num_sequences + 1, batch.first_token.back());
    put(at.context_tokens, batch.context_tokens, shape.num_sequences, 0);
    const int64_t nobodys_slot = plan_.recurrent ? plan_.recurrent->num_slots : 0;
    put(at.state_slot, batch.state_slot, shape.num_sequences, i32(nobodys_slot));
    put(at.logits_token, batch.logits_token, shape.num_logits, 0);
    for (std::size_t group = 0; group < plan_.paged.size(); ++group) {
        const auto nobodys_page = static_cast<int32_t>(plan_.paged[group].num_blocks);
        put(at.block_table[group], batch.block_table[group], shape.num_sequences * plan_.paged[group].table_width,
            nobodys_page);
    }
    int32_t* token_sequence = block + at.token_sequence;
    for (int64_t s = 0; s < batch.num_sequences(); ++s)
        std::fill(token_sequence + batch.first_token[s], token_sequence + batch.first_token[s + 1],
                  static_cast<int32_t>(s));
    // Only a decode step is filled up, where token t is that of sequence t.
    std::iota(token_sequence + batch.num_tokens(), token_sequence + shape.num_tokens,
              static_cast<int32_t>(batch.num_tokens()));
    if (shape.num_tiles > 0) fill_tiles(batch, shape, block + at.tiles);
    if (shape.chooses) fill_choices(choices, shape, block);
}

// Rows that a step is filled up with are greedy, which costs least.
void StepInputs::fill_choices(std::span<const TokenChoice> choices, const StepShape& shape, int32_t* block) const {
    const Layout at = layout(shape);
    const SamplingParams greedy;
    for (std::size_t row = 0; row < static_cast<std::size_t>(shape.num_logits); ++row) {
        const TokenChoice choice = row < choices.size() ? choices[row] : TokenChoice{&greedy, 0};
        const SamplingParams& params = *choice.sampling;
        block[at.temperature + row] = std::bit_cast<int32_t>(params.temperature);
        block[at.top_k + row] = static_cast<int32_t>(std::min(params.top_k.value_or(vocab_size_), vocab_size_));
        block[at.top_p + row] = std::bit_cast<int32_t>(params.top_p);
        block[at.min_p + row] = std::bit_cast<int32_t>(params.min_p);
        std::memcpy(block + at.seed + 2 * row, &params.seed, sizeof(params.seed));
        block[at.token_index + row] = static_cast<int32_t>(choice.token_index);
    }
}

// The longest walks over keys come first, so that no processor is left with one at the end.
void StepInputs::fill_tiles(const StepBatch& batch, const StepShape& shape, int32_t* tiles) const {
    std::vector<std::pair<int32_t, int32_t>> order;  // sequence, first query of the tile
    for (int32_t s = i32(shape.split.number); s < batch.num_sequences(); ++s)
        for (int32_t first = 0; first < num_new_tokens(batch, s); first += i32(room_.tile))
            order.emplace_back(s, first);
    std::ranges::stable_sort(order, std::greater{},
                             [&](const auto& tile) { return batch.context_tokens[tile.first] + tile.second; });
    for (const auto& [sequence, first] : order) {
        *tiles++ = sequence;
        *tiles++ = first;
    }
}

void StepInputs::copy(const StepShape& shape, int side, const Arena& arena, Stream& stream) const {
    stream.copy_to_device(arena.at(block_), host_[side].data(), layout(shape).size * kI32Bytes);
}

StepInputs::Addresses StepInputs::addresses(const StepShape& shape, const Arena& arena) const {
    const Layout offsets = layout(shape);
    const auto at = [&](int64_t offset) { return arena.at(block_, offset * kI32Bytes); };
    Addresses addresses{.token_ids = at(offsets.token_ids),
                        .positions = at(offsets.positions),
                        .token_sequence = at(offsets.token_sequence),
                        .first_token = at(offsets.first_token),
                        .context_tokens = at(offsets.context_tokens),
                        .state_slot = at(offsets.state_slot),
                        .logits_token = at(offsets.logits_token),
                        .tiles = at(offsets.tiles),
                        .temperature = at(offsets.temperature),
                        .top_k = at(offsets.top_k),
                        .top_p = at(offsets.top_p),
                        .min_p = at(offsets.min_p),
                        .seed = at(offsets.seed),
                        .token_index = at(offsets.token_index),
                        .block_table = {}};
    for (const int64_t table : offsets.block_table) addresses.block_table.push_back(at(table));
    return addresses;
}

StepInputs::Layout StepInputs::layout(const StepShape& shape) const {
    int64_t size = 0;
    const auto place = [&size](int64_t count) {
        const int64_t offset = size;
        size += divide_up(count, kAlignment) * kAlignment;
        return offset;
    };
    const int64_t choices = shape.chooses ? shape.num_logits : 0;
    Layout layout{.token_ids = place(shape.num_tokens),
                  .positions = place(shape.num_tokens),
                  .token_sequence = place(shape.num_tokens),
                  .first_token = place(shape.num_sequences + 1),
                  .context_tokens = place(shape.num_sequences),
                  .state_slot = place(shape.num_sequences),
                  .logits_token = place(shape.num_logits),
                  .tiles = place(2 * shape.num_tiles),
                  .temperature = place(choices),
                  .top_k = place(choices),
                  .top_p = place(choices),
                  .min_p = place(choices),
                  .seed = place(2 * choices),
                  .token_index = place(choices),
                  .block_table = {},
                  .size = 0};
    for (const PagedKvGroup& group : plan_.paged)
        layout.block_table.push_back(place(shape.num_sequences * group.table_width));
    layout.size = size;
    return layout;
}

}  // namespace gemma2_fast
