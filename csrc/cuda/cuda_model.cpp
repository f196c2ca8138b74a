#include "cuda/cuda_model.h"

#include <algorithm>
#include <string>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kSmallestNormBlock = 1024;  // that kernels are compiled for

}  // namespace

CudaModel::CudaModel(const ModelSpec& spec, const CachePlan& plan, const StepSizes& sizes, int num_multiprocessors,
                     KernelSet& kernels, DeviceWeights& weights, Arena& arena)
    : spec_(spec),
      sizes_(sizes),
      head_(kernels, weights.matrix({{"embedding", spec.vocab_size}}, spec.model_width), ProductKind::kHead,
            sizes.max_logits),
      final_gain_(weights.vector("final_norm", spec.model_width)),
      embed_(&kernels.find("embed", {{"FORMAT", static_cast<int64_t>(head_.matrix().format)}})),
      first_norm_(&kernels.find("rms_norm", {{"BLOCK", norm_block()}})) {
    for (std::size_t index = 0; index < spec.layers.size(); ++index)
        layers_.push_back(load_layer(index, plan.page_tokens, kernels, weights));
    if (layers_.empty()) throw BackendError("backend=\"cuda\" needs a model with layers");
    reserve_cache(plan, arena);
    reserve_rows(num_multiprocessors, arena);
}

int64_t CudaModel::norm_block() const { return std::max(kSmallestNormBlock, power_of_two(spec_.model_width)); }

CudaLayer CudaModel::load_layer(std::size_t index, int64_t page_tokens, KernelSet& kernels,
                                DeviceWeights& weights) const {
    const LayerSpec& layer = spec_.layers[index];
    const std::string prefix = "layers." + std::to_string(index) + ".";
    const int64_t width = spec_.model_width, tokens = sizes_.max_tokens;
    const auto load_mixer = [&]() -> std::variant<AttentionLayer, RecurrentLayer> {
        if (const auto* recurrent = std::get_if<RecurrentSpec>(&layer.mixer)) {
            check_spec(*recurrent, prefix + "recurrent: ");
            return RecurrentLayer(*recurrent, prefix + "recurrent.", width, tokens, kernels, weights);
        }
        const auto& attention = std::get<AttentionSpec>(layer.mixer);
        check_spec(attention, prefix + "attention: ");
        return AttentionLayer(attention, prefix + "attention.", width, page_tokens, tokens, kernels, weights);
    };
    const auto gain = [&](bool present, const char* name) -> std::optional<Arena::Slice> {
        if (!present) return std::nullopt;
        return weights.vector(prefix + name, width);
    };
    const auto norm = [&](bool has_after) {
        return &kernels.find("rms_norm_add", {{"HAS_AFTER", has_after}, {"BLOCK", norm_block()}});
    };
    return {.mixer = load_mixer(),
            .mlp = GatedMlp(prefix + "mlp.", width, layer.mlp_width, layer.mlp_bias, tokens, kernels, weights),
            .gain_before_mixer = *gain(true, "norm_before_mixer"),
            .gain_before_mlp = *gain(true, "norm_before_mlp"),
            .gain_after_mixer = gain(layer.norm_after_mixer, "norm_after_mixer"),
            .gain_after_mlp = gain(layer.norm_after_mlp, "norm_after_mlp"),
            .norm_after_mixer = norm(layer.norm_after_mixer),
            .norm_after_mlp = norm(layer.norm_after_mlp)};
}

void CudaModel::reserve_cache(const CachePlan& plan, Arena& arena) {
    for (std::size_t index = 0; index < layers_.size(); ++index) {
        const auto number = static_cast<int32_t>(index);
        if (auto* attention = std::get_if<AttentionLayer>(&layers_[index].mixer)) {
            const AttentionSpec& spec = attention->spec();
            const CachePlace place = place_in_cache(plan, number, spec.num_kv_heads, spec.head_dim, spec.window_keys);
            const PagedKvGroup& group = plan.paged[place.group_index];
            // One page more than the plan has: what fills up a decode step is written there.
            const Arena::Slice pages = arena.reserve((group.num_blocks + 1) * 2 * spec.num_kv_heads * plan.page_tokens *
                                                     spec.head_dim * kBF16Bytes);
            attention->join(place.group_index, group.table_width, pages, tables_of(spec.rope, arena));
            cache_.push_back(pages);
        } else {
            auto& recurrent = std::get<RecurrentLayer>(layers_[index].mixer);
            const RecurrentSpec& spec = recurrent.spec();
            place_in_states(plan, number, spec.width, spec.conv_width - 1);
            const RecurrentStates states = RecurrentStates::reserve(arena, *plan.recurrent);
            recurrent.join(states);
            cache_.insert(cache_.end(), {states.states, states.inputs_ring});
        }
    }
}

RopeTables CudaModel::tables_of(const RopeSpec& rope, Arena& arena) {
    const auto found = std::ranges::find(ropes_, rope, &RopeTable::spec);
    if (found != ropes_.end()) return found->tables;
    const int64_t bytes = sizes_.max_seq_len * static_cast<int64_t>(rope.inverse_frequencies.size()) * kF32Bytes;
    ropes_.push_back({rope, {arena.reserve(bytes), arena.reserve(bytes)}});
    return ropes_.back().tables;
}

void CudaModel::reserve_rows(int num_multiprocessors, Arena& arena) {
    int64_t mixed = 0, attended = 0, mlp = 0, head_dim = 0, kv_heads = 0, rows = 0, recurrent_width = 0;
    for (const CudaLayer& layer : layers_) {
        mlp = std::max(mlp, layer.mlp.width());
        std::visit(
            [&](const auto& mixer) {
                mixed = std::max(mixed, mixer.mixed_width());
                attended = std::max(attended, mixer.attended_width());
            },
            layer.mixer);
        if (const auto* attention = std::get_if<AttentionLayer>(&layer.mixer)) {
            head_dim = std::max(head_dim, attention->spec().head_dim);
            kv_heads = std::max(kv_heads, attention->spec().num_kv_heads);
            rows = std::max(rows, attention->decode_rows());
        } else {
            recurrent_width = std::max(recurrent_width, std::get<RecurrentLayer>(layer.mixer).spec().width);
        }
    }
    const int64_t tokens = sizes_.max_tokens, width = spec_.model_width;
    rows_ = {.residual = arena.reserve(tokens * width * kF32Bytes),
             .normed = arena.reserve(tokens * width * kBF16Bytes),
             .branch = arena.reserve(tokens * width * kBF16Bytes),
             .mixed = arena.reserve(tokens * mixed * kBF16Bytes),
             .attended = arena.reserve(tokens * attended * kBF16Bytes),
             .gate_up = arena.reserve(tokens * 2 * mlp * kBF16Bytes),
             .hidden = arena.reserve(tokens * mlp * kBF16Bytes),
             .logits = arena.reserve(sizes_.max_logits * spec_.vocab_size * kF32Bytes),
             .chosen = arena.reserve(sizes_.max_logits * kI32Bytes)};
    split_scratch_ = SplitScratch::reserve(arena, sizes_.max_sequences, kv_heads, rows, head_dim, num_multiprocessors);
    recurrent_scratch_ = RecurrentScratch::reserve(arena, tokens, recurrent_width);
}

QueryRoom CudaModel::query_room() const {
    std::optional<QueryRoom> room;
    for (const CudaLayer& layer : layers_) {
        const auto* attention = std::get_if<AttentionLayer>(&layer.mixer);
        if (!attention) continue;
        const QueryRoom own = attention->query_room(), shared = room.value_or(own);
        if (own.tile != shared.tile)
            throw BackendError("attention layers of one model must share a number of queries a tile, found " +
                               std::to_string(shared.tile) + " and " + std::to_string(own.tile));
        room = {.tile = own.tile, .split = std::min(own.split, shared.split)};
    }
    return room.value_or(QueryRoom{.tile = sizes_.max_tokens, .split = 0});
}

void CudaModel::copy_states(std::span<const StateCopy> copies, const Arena& arena, Stream& stream) const {
    for (const StateCopy slots : copies)
        for (const CudaLayer& layer : layers_)
            if (const auto* recurrent = std::get_if<RecurrentLayer>(&layer.mixer))
                recurrent->copy_state(slots, arena, stream);
}

void CudaModel::enqueue(const StepContext& step) const {
    embed(step);
    for (std::size_t index = 0; index < layers_.size(); ++index) {
        const CudaLayer& layer = layers_[index];
        if (const auto* attention = std::get_if<AttentionLayer>(&layer.mixer))
            attention->enqueue(step, split_scratch_, spec_.norm_epsilon);
        else
            std::get<RecurrentLayer>(layer.mixer).enqueue(step, recurrent_scratch_);
        add_branch(step, *layer.norm_after_mixer, layer.gain_after_mixer, layer.gain_before_mlp);
        layer.mlp.enqueue(step);
        const bool last = index + 1 == layers_.size();
        add_branch(step, *layer.norm_after_mlp, layer.gain_after_mlp,
                   last ? final_gain_ : layers_[index + 1].gain_before_mixer);
    }
    project_logits(step);
}

// The residual, and its norm before the first mixer.
void CudaModel::embed(const StepContext& step) const {
    const DeviceMatrix& table = head_.matrix();
    embed_->launch(step.stream,
                   {.x = step.shape.num_tokens, .y = divide_up(spec_.model_width, embed_->constant("BLOCK"))},
                   {{"token_ids", step.inputs.token_ids},
                    {"chosen", step.at(step.rows.chosen)},
                    {"table", step.at(table.weight)},
                    {"scales", step.at(table.scales)},
                    {"factors", step.at(table.factors)},
                    {"out", step.at(step.rows.residual)},
                    {"width", i32(spec_.model_width)},
                    {"scale", spec_.embedding_scale}});
    first_norm_->launch(step.stream, {.x = step.shape.num_tokens},
                        {{"x", step.at(step.rows.residual)},
                         {"weight", step.at(layers_.front().gain_before_mixer)},
                         {"out", step.at(step.rows.normed)},
                         {"width", i32(spec_.model_width)},
                         {"epsilon", spec_.norm_epsilon}});
}

// residual += norm(branch, after), then normed = norm(residual, before).
void CudaModel::add_branch(const StepContext& step, const Kernel& norm, const std::optional<Arena::Slice>& after,
                           const Arena::Slice& before) const {
    norm.launch(step.stream, {.x = step.shape.num_tokens},
                {{"branch", step.at(step.rows.branch)},
                 {"after", step.at(after.value_or(before))},
                 {"residual", step.at(step.rows.residual)},
                 {"before", step.at(before)},
                 {"out", step.at(step.rows.normed)},
                 {"width", i32(spec_.model_width)},
                 {"epsilon", spec_.norm_epsilon}});
}

// The last norm was of every token; only those asked for are multiplied.
void CudaModel::project_logits(const StepContext& step) const {
    for (int64_t first = 0; first < step.shape.num_logits; first += kFewTokens) {
        const int64_t count = std::min(kFewTokens, step.shape.num_logits - first);
        head_.launch_gathered(step.stream, step.arena, step.at(step.rows.normed),
                              step.inputs.logits_token + static_cast<CUdeviceptr>(first * kI32Bytes),
                              step.arena.at(step.rows.logits, first * spec_.vocab_size * kF32Bytes), count);
    }
}

}  // namespace gemma2_fast
