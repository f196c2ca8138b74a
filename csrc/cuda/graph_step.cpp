#include "cuda/graph_step.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr int64_t kFewTokens = 16;            // products of so many tokens stream the weights
constexpr int64_t kDecodeRows = 16;           // query heads of a sequence and kv head, in a tile of decode attention
constexpr int64_t kProgramsPerProcessor = 2;  // of decode attention: enough to keep memory busy
constexpr int64_t kLeastNormBlock = 1024;
constexpr int64_t kLeastSampleBlocks = 128;
constexpr int64_t kBF16Bytes = 2, kF32Bytes = 4, kKeyBytes = 8;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t power_of_two(int64_t least) { return static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(least))); }
int32_t i32(int64_t value) { return static_cast<int32_t>(value); }
int64_t as_constant(DeviceFormat format) { return static_cast<int64_t>(format); }

}  // namespace

GraphStep::GraphStep(std::shared_ptr<const Device> device, const ModelSpec& spec, const CachePlan& plan,
                     const std::map<std::string, DeviceFormat>& formats, std::vector<KernelImage> kernels,
                     const Options& options)
    : device_((device->activate(), std::move(device))),
      options_(options),
      plan_(plan),
      model_(spec, plan, formats, arena_),
      kernels_(*device_, std::move(kernels)),
      inputs_(*device_, plan,
              {.max_step_tokens = options.limits.max_step_tokens,
               .max_sequences = options.max_sequences,
               .max_logits_rows = options.limits.max_logits_rows,
               .vocab_size = spec.vocab_size,
               .queries_per_tile = queries_per_tile()},
              arena_),
      stream_(*device_),
      chosen_(*device_, largest_num_logits() * static_cast<int64_t>(sizeof(int32_t)), "chosen tokens") {
    find_kernels();
    reserve_activations();
    arena_.allocate(*device_, "weights, cache and activations");
    stream_.fill(arena_.at(arrivals_), 0, arrivals_.num_bytes);
    uploader_ = std::make_unique<Uploader>(stream_);
    upload_rope_tables();
}

GraphStep::~GraphStep() {
    try {
        device_->activate();
        stream_.wait();  // nothing is freed under a running kernel
    } catch (const std::exception&) {
        // A lost device runs nothing, and frees its memory itself.
    }
}

// ---- what a model needs: found, reserved and copied once

void GraphStep::find_kernels() {
    const ModelSpec& spec = model_.spec;
    const int64_t norm_block = std::max(kLeastNormBlock, power_of_two(spec.model_width));
    embed_ = &kernels_.find("embed", {{"INT8", as_constant(model_.embedding.format)}});
    first_norm_ = &kernels_.find("rms_norm", {{"BLOCK", norm_block}});
    head_ = product_kernels(model_.embedding.format, Product::kHead);
    const bool capped = spec.final_softcap.has_value();
    sample_scan_ = &kernels_.find("sample_scan", {});
    const int64_t blocks =
        std::max(kLeastSampleBlocks, power_of_two(divide_up(spec.vocab_size, sample_scan_->constant("BLOCK"))));
    sample_weigh_ = &kernels_.find("sample_weigh", {{"CAPPED", capped}, {"BLOCKS", blocks}});
    sample_draw_ = &kernels_.find("sample_draw", {{"CAPPED", capped}, {"BLOCKS", blocks}});
    for (const CudaLayer& layer : model_.layers) {
        const CudaAttention& attention = layer.attention;
        const auto norm = [&](const std::optional<Arena::Slice>& after) {
            return &kernels_.find("rms_norm_add", {{"HAS_AFTER", after.has_value()}, {"BLOCK", norm_block}});
        };
        layer_kernels_.push_back({
            .rope = &kernels_.find("rope", {{"NORMED", attention.spec.qk_norm},
                                            {"PAIRS", model_.ropes[attention.rope_index].inverse_frequencies.size()},
                                            {"HEAD_DIM", attention.spec.head_dim},
                                            {"PAGE", plan_.page_tokens}}),
            .decode = &attention_kernel("attention_decode", attention.spec),
            .prefill = &attention_kernel("attention_prefill", attention.spec),
            .qkv = product_kernels(attention.qkv.format, Product::kPlain),
            .output = product_kernels(attention.output.format, Product::kPlain),
            .gated = product_kernels(layer.gate_up.format, Product::kGated),
            .geglu = &kernels_.find("geglu", {}),
            .down = product_kernels(layer.down.format, Product::kPlain),
            .after_mixer = norm(layer.gain_after_mixer),
            .after_mlp = norm(layer.gain_after_mlp),
        });
    }
}

const Kernel& GraphStep::attention_kernel(const std::string& op, const AttentionSpec& spec) {
    return kernels_.find(op, {{"CAPPED", spec.score_softcap.has_value()},
                              {"WINDOWED", spec.window_keys.has_value()},
                              {"GROUP", spec.num_query_heads / spec.num_kv_heads},
                              {"HEAD_DIM", spec.head_dim},
                              {"PAGE", plan_.page_tokens}});
}

GraphStep::ProductKernels GraphStep::product_kernels(DeviceFormat format, Product product) {
    const auto streaming = [&](int64_t tokens) {
        return &kernels_.find("matmul",
                              {{"FORMAT", as_constant(format)},
                               {"GEGLU", product == Product::kGated},
                               {"GATHER", product == Product::kHead},
                               {"TOKENS", tokens}},
                              {{"out", product == Product::kHead ? "*fp32" : "*bf16"}});
    };
    const Kernel* tiled = product == Product::kHead || largest_step() <= kFewTokens
                              ? nullptr
                              : &kernels_.find("matmul_tiled", {{"FORMAT", as_constant(format)}});
    return {streaming(1), streaming(kFewTokens), tiled};
}

int64_t GraphStep::queries_per_tile() {
    std::optional<int64_t> queries;
    for (const CudaLayer& layer : model_.layers) {
        const Kernel& kernel = attention_kernel("attention_prefill", layer.attention.spec);
        const int64_t found = kernel.constant("TILE") / kernel.constant("GROUP");
        if (queries.value_or(found) != found)
            throw BackendError("attention layers of one model must share a number of queries a tile, found " +
                               std::to_string(*queries) + " and " + std::to_string(found));
        queries = found;
    }
    if (!queries) throw BackendError("the CUDA backend needs a model with attention layers");
    return *queries;
}

int64_t GraphStep::largest_step() const {
    return std::max(options_.limits.max_step_tokens, power_of_two(options_.max_sequences));
}

int64_t GraphStep::largest_num_logits() const {
    return std::max(options_.limits.max_logits_rows, power_of_two(options_.max_sequences));
}

void GraphStep::reserve_activations() {
    const ModelSpec& spec = model_.spec;
    const int64_t sequences = power_of_two(options_.max_sequences), tokens = largest_step();
    const int64_t logits_rows = largest_num_logits();
    int64_t qkv_width = 0, query_width = 0, mlp_width = 0, head_dim = 0, kv_heads = 0;
    for (const CudaLayer& layer : model_.layers) {
        const AttentionSpec& attention = layer.attention.spec;
        qkv_width = std::max(qkv_width, layer.attention.qkv.rows);
        query_width = std::max(query_width, layer.attention.output.cols);
        mlp_width = std::max(mlp_width, layer.mlp_width);
        head_dim = std::max(head_dim, attention.head_dim);
        kv_heads = std::max(kv_heads, attention.num_kv_heads);
    }
    residual_ = arena_.reserve(tokens * spec.model_width * kF32Bytes);
    normed_ = arena_.reserve(tokens * spec.model_width * kBF16Bytes);
    branch_ = arena_.reserve(tokens * spec.model_width * kBF16Bytes);
    qkv_ = arena_.reserve(tokens * qkv_width * kBF16Bytes);
    attended_ = arena_.reserve(tokens * query_width * kBF16Bytes);
    gate_up_ = arena_.reserve(tokens * 2 * mlp_width * kBF16Bytes);
    hidden_ = arena_.reserve(tokens * mlp_width * kBF16Bytes);
    logits_ = arena_.reserve(logits_rows * spec.vocab_size * kF32Bytes);
    const int64_t pairs = sequences * kv_heads;
    const int64_t programs = std::max(pairs, kProgramsPerProcessor * device_->num_multiprocessors());
    parts_ = arena_.reserve(programs * kDecodeRows * head_dim * kF32Bytes);
    part_sums_ = arena_.reserve(programs * 2 * kDecodeRows * kF32Bytes);
    arrivals_ = arena_.reserve(pairs * static_cast<int64_t>(sizeof(int32_t)));
    const int64_t blocks = logits_rows * divide_up(spec.vocab_size, sample_scan_->constant("BLOCK"));
    firsts_ = arena_.reserve(blocks * kKeyBytes);
    best_ = arena_.reserve(blocks * sample_scan_->constant("KEEP") * kKeyBytes);
    sums_ = arena_.reserve(blocks * static_cast<int64_t>(sizeof(double)));
    tokens_ = arena_.reserve(logits_rows * static_cast<int64_t>(sizeof(int32_t)));
    for (const PagedKvGroup& group : plan_.paged)
        cache_.push_back(arena_.reserve(static_cast<int64_t>(group.layers.size()) * layer_bytes(group)));
    for (const RopeSpec& rope : model_.ropes) {
        const int64_t bytes = options_.max_seq_len * static_cast<int64_t>(rope.inverse_frequencies.size()) * kF32Bytes;
        ropes_.push_back({arena_.reserve(bytes), arena_.reserve(bytes)});
    }
}

void GraphStep::upload_rope_tables() {
    for (std::size_t index = 0; index < ropes_.size(); ++index) {
        std::vector<float> cos, sin;
        for (int64_t position = 0; position < options_.max_seq_len; ++position)
            for (const float frequency : model_.ropes[index].inverse_frequencies) {
                const float angle = static_cast<float>(position) * frequency;
                cos.push_back(std::cos(angle));
                sin.push_back(std::sin(angle));
            }
        uploader_->copy(arena_.at(ropes_[index].cos), reinterpret_cast<const std::byte*>(cos.data()),
                        ropes_[index].cos.num_bytes);
        uploader_->copy(arena_.at(ropes_[index].sin), reinterpret_cast<const std::byte*>(sin.data()),
                        ropes_[index].sin.num_bytes);
    }
}

void GraphStep::upload(const std::string& name, const std::string& part, std::span<const std::byte> bytes) {
    const Arena::Slice place = model_.place(name, part);
    if (static_cast<int64_t>(bytes.size()) != place.num_bytes)
        throw Error("weights: " + part + " of " + name + " has " + std::to_string(bytes.size()) + " bytes, expected " +
                    std::to_string(place.num_bytes));
    if (!uploader_) throw Error("weights: " + name + " came after the upload was finished");
    device_->activate();
    uploader_->copy(arena_.at(place), bytes.data(), place.num_bytes);
    uploaded_.emplace(name, part);
}

void GraphStep::finish_upload() {
    std::string missing;
    for (const auto& [name, part] : model_.parts())
        if (!uploaded_.contains({name, part})) missing += (missing.empty() ? "" : ", ") + name + " (" + part + ")";
    if (!missing.empty()) throw Error("weights: not uploaded: " + missing);
    device_->activate();
    stream_.wait();
    uploader_.reset();
}

void GraphStep::poison_cache() {
    device_->activate();
    for (const Arena::Slice& pages : cache_) stream_.fill(arena_.at(pages), 0xff, pages.num_bytes);
    stream_.wait();
}

// ---- one step

void GraphStep::run(const StepBatch& batch, std::span<float> logits) {
    check_batch(batch, plan_, options_.limits, static_cast<int64_t>(logits.size()));
    start(batch, {}, inputs_.shape(batch, false));
    copy_logits(logits);
}

void GraphStep::choose(const StepBatch& batch, std::span<const TokenChoice> choices, std::span<int32_t> tokens) {
    check_batch(batch, plan_, options_.limits, batch.num_logits() * model_.spec.vocab_size);
    if (static_cast<int64_t>(choices.size()) != batch.num_logits() || tokens.size() != choices.size())
        throw Error(std::to_string(choices.size()) + " choices and " + std::to_string(tokens.size()) + " tokens for " +
                    std::to_string(batch.num_logits()) + " rows of logits");
    start(batch, choices, inputs_.shape(batch, true));
    stream_.wait();
    std::memcpy(tokens.data(), chosen_.data(), tokens.size_bytes());
}

void GraphStep::copy_logits(std::span<float> logits) {
    if (!logits.empty())
        stream_.copy_to_host(logits.data(), arena_.at(logits_), static_cast<int64_t>(logits.size_bytes()));
    stream_.wait();
}

void GraphStep::start(const StepBatch& batch, std::span<const TokenChoice> choices, const StepShape& shape) {
    if (uploader_) throw Error("weights: the upload is not finished");
    device_->activate();
    inputs_.fill(batch, choices, shape);
    if (shape.decode_keys && options_.captures)
        replay(shape);
    else
        enqueue(shape);
}

void GraphStep::replay(const StepShape& shape) {
    std::unique_ptr<Graph>& graph = graphs_[shape];
    if (!graph) graph = std::make_unique<Graph>(*device_, stream_.capture([&] { enqueue(shape); }));
    stream_.launch(*graph);
}

void GraphStep::enqueue(const StepShape& shape) {
    const ModelSpec& spec = model_.spec;
    const StepInputs::Addresses inputs = inputs_.addresses(shape, arena_);
    inputs_.copy(shape, arena_, stream_);
    embed_->launch(stream_, {.x = shape.num_tokens, .y = divide_up(spec.model_width, embed_->constant("BLOCK"))},
                   {{"token_ids", inputs.token_ids},
                    {"table", arena_.at(model_.embedding.weight)},
                    {"scales", arena_.at(model_.embedding.scales)},
                    {"out", arena_.at(residual_)},
                    {"width", i32(spec.model_width)},
                    {"scale", spec.embedding_scale}});
    first_norm_->launch(stream_, {.x = shape.num_tokens},
                        {{"x", arena_.at(residual_)},
                         {"weight", arena_.at(model_.layers.front().gain_before_mixer)},
                         {"out", arena_.at(normed_)},
                         {"width", i32(spec.model_width)},
                         {"epsilon", spec.norm_epsilon}});
    for (std::size_t index = 0; index < model_.layers.size(); ++index) {
        mix(index, shape, inputs);
        mlp(index, shape);
    }
    project_logits(shape, inputs);
    if (shape.chooses) choose_tokens(shape, inputs);
}

void GraphStep::mix(std::size_t index, const StepShape& shape, const StepInputs::Addresses& inputs) {
    const CudaLayer& layer = model_.layers[index];
    const LayerKernels& kernels = layer_kernels_[index];
    product(kernels.qkv, layer.attention.qkv, normed_, qkv_, shape.num_tokens);
    rotate_and_store(layer.attention, *kernels.rope, shape, inputs);
    attend(layer.attention, kernels, shape, inputs);
    product(kernels.output, layer.attention.output, attended_, branch_, shape.num_tokens);
    add_branch(*kernels.after_mixer, layer.gain_after_mixer, layer.gain_before_mlp, shape.num_tokens);
}

void GraphStep::mlp(std::size_t index, const StepShape& shape) {
    const CudaLayer& layer = model_.layers[index];
    const LayerKernels& kernels = layer_kernels_[index];
    product(kernels.gated, layer.gate_up, normed_, shape.num_tokens > kFewTokens ? gate_up_ : hidden_,
            shape.num_tokens);
    if (shape.num_tokens > kFewTokens)
        kernels.geglu->launch(
            stream_, {.x = shape.num_tokens, .y = divide_up(layer.mlp_width, kernels.geglu->constant("BLOCK"))},
            {{"gate_up", arena_.at(gate_up_)}, {"out", arena_.at(hidden_)}, {"width", i32(layer.mlp_width)}});
    product(kernels.down, layer.down, hidden_, branch_, shape.num_tokens);
    const bool last = index + 1 == model_.layers.size();
    add_branch(*kernels.after_mlp, layer.gain_after_mlp,
               last ? model_.final_gain : model_.layers[index + 1].gain_before_mixer, shape.num_tokens);
}

void GraphStep::rotate_and_store(const CudaAttention& attention, const Kernel& kernel, const StepShape& shape,
                                 const StepInputs::Addresses& inputs) {
    const AttentionSpec& spec = attention.spec;
    const Rope& rope = ropes_[attention.rope_index];
    const CUdeviceptr none = arena_.at(rope.cos);
    kernel.launch(stream_, {.x = shape.num_tokens, .y = spec.num_query_heads + 2 * spec.num_kv_heads},
                  {{"qkv", arena_.at(qkv_)},
                   {"positions", inputs.positions},
                   {"token_sequence", inputs.token_sequence},
                   {"cos", arena_.at(rope.cos)},
                   {"sin", arena_.at(rope.sin)},
                   {"query_gain", attention.query_gain ? arena_.at(*attention.query_gain) : none},
                   {"key_gain", attention.key_gain ? arena_.at(*attention.key_gain) : none},
                   {"pages", pages(attention)},
                   {"num_query_heads", i32(spec.num_query_heads)},
                   {"num_kv_heads", i32(spec.num_kv_heads)},
                   {"block_table", inputs.block_table[attention.place.group_index]},
                   {"table_width", i32(plan_.paged[attention.place.group_index].table_width)},
                   {"epsilon", model_.spec.norm_epsilon}});
}

void GraphStep::attend(const CudaAttention& attention, const LayerKernels& kernels, const StepShape& shape,
                       const StepInputs::Addresses& inputs) {
    const AttentionSpec& spec = attention.spec;
    std::vector<KernelArgument> arguments{
        {"queries", arena_.at(qkv_)},
        {"pages", pages(attention)},
        {"num_kv_heads", i32(spec.num_kv_heads)},
        {"block_table", inputs.block_table[attention.place.group_index]},
        {"table_width", i32(plan_.paged[attention.place.group_index].table_width)},
        {"first_token", inputs.first_token},
        {"context_tokens", inputs.context_tokens},
        {"out", arena_.at(attended_)},
        {"query_stride", i32(attention.qkv.rows)},
        {"out_stride", i32(attention.output.cols)},
        {"scale", spec.query_scale},
        {"cap", spec.score_softcap.value_or(1.0f)},
        {"window", i32(spec.window_keys.value_or(0))},
    };
    if (shape.decode_keys) {
        arguments.insert(
            arguments.end(),
            {{"parts", arena_.at(parts_)}, {"part_sums", arena_.at(part_sums_)}, {"arrivals", arena_.at(arrivals_)}});
        const int64_t splits = num_splits(spec, *kernels.decode, shape);
        kernels.decode->launch(stream_, {.x = splits, .y = spec.num_kv_heads, .z = shape.num_sequences}, arguments);
    } else {
        arguments.push_back({"tiles", inputs.tiles});
        kernels.prefill->launch(stream_, {.x = shape.num_tiles, .y = spec.num_kv_heads}, arguments);
    }
}

// As many as fill the processors, but none that would have less than a block of keys.
int64_t GraphStep::num_splits(const AttentionSpec& spec, const Kernel& kernel, const StepShape& shape) const {
    const int64_t pairs = spec.num_kv_heads * shape.num_sequences;
    const int64_t filling = kProgramsPerProcessor * device_->num_multiprocessors() / pairs;
    const int64_t keys = std::min(*shape.decode_keys, spec.window_keys.value_or(*shape.decode_keys));
    return std::clamp<int64_t>(filling, 1, divide_up(keys, kernel.constant("BLOCK")));
}

void GraphStep::add_branch(const Kernel& kernel, const std::optional<Arena::Slice>& after, const Arena::Slice& before,
                           int64_t num_tokens) {
    kernel.launch(stream_, {.x = num_tokens},
                  {{"branch", arena_.at(branch_)},
                   {"after", arena_.at(after.value_or(before))},
                   {"residual", arena_.at(residual_)},
                   {"before", arena_.at(before)},
                   {"out", arena_.at(normed_)},
                   {"width", i32(model_.spec.model_width)},
                   {"epsilon", model_.spec.norm_epsilon}});
}

// The norm before the head is done for every token; only those asked for are multiplied.
void GraphStep::project_logits(const StepShape& shape, const StepInputs::Addresses& inputs) {
    const int64_t row_bytes = model_.spec.vocab_size * kF32Bytes;
    for (int64_t first = 0; first < shape.num_logits; first += kFewTokens) {
        const int64_t count = std::min(kFewTokens, shape.num_logits - first);
        stream_matrix(count == 1 ? *head_.one : *head_.few, model_.embedding, model_.embedding.rows, arena_.at(normed_),
                      inputs.logits_token + static_cast<CUdeviceptr>(first) * sizeof(int32_t),
                      arena_.at(logits_, first * row_bytes), count);
    }
}

void GraphStep::choose_tokens(const StepShape& shape, const StepInputs::Addresses& inputs) {
    const std::vector<KernelArgument> of_vocabulary{{"vocab", i32(model_.spec.vocab_size)},
                                                    {"cap", model_.spec.final_softcap.value_or(1.0f)},
                                                    {"logits", arena_.at(logits_)},
                                                    {"temperature", inputs.temperature},
                                                    {"top_k", inputs.top_k},
                                                    {"top_p", inputs.top_p},
                                                    {"min_p", inputs.min_p},
                                                    {"seed", inputs.seed},
                                                    {"token_index", inputs.token_index},
                                                    {"firsts", arena_.at(firsts_)},
                                                    {"best", arena_.at(best_)},
                                                    {"sums", arena_.at(sums_)},
                                                    {"out", arena_.at(tokens_)}};
    const LaunchGrid blocks{.x = divide_up(model_.spec.vocab_size, sample_scan_->constant("BLOCK")),
                            .y = shape.num_logits};
    sample_scan_->launch(stream_, blocks, of_vocabulary);
    sample_weigh_->launch(stream_, blocks, of_vocabulary);
    sample_draw_->launch(stream_, {.x = shape.num_logits}, of_vocabulary);
    stream_.copy_to_host(chosen_.data(), arena_.at(tokens_), shape.num_logits * static_cast<int64_t>(sizeof(int32_t)));
}

void GraphStep::product(const ProductKernels& kernels, const DeviceMatrix& matrix, const Arena::Slice& x,
                        const Arena::Slice& out, int64_t num_tokens) {
    if (num_tokens <= kFewTokens) {
        const Kernel& kernel = num_tokens == 1 ? *kernels.one : *kernels.few;
        stream_matrix(kernel, matrix, matrix.rows / (1 + kernel.constant("GEGLU")), arena_.at(x), arena_.at(x),
                      arena_.at(out), num_tokens);
        return;
    }
    const Kernel& kernel = *kernels.many;
    const int64_t tiles =
        divide_up(num_tokens, kernel.constant("TILE_TOKENS")) * divide_up(matrix.rows, kernel.constant("TILE_ROWS"));
    kernel.launch(stream_, {.x = tiles},
                  {{"x", arena_.at(x)},
                   {"weight", arena_.at(matrix.weight)},
                   {"scales", arena_.at(matrix.scales)},
                   {"factors", arena_.at(matrix.factors)},
                   {"out", arena_.at(out)},
                   {"rows", i32(matrix.rows)},
                   {"cols", i32(matrix.cols)},
                   {"num_tokens", i32(num_tokens)}});
}

void GraphStep::stream_matrix(const Kernel& kernel, const DeviceMatrix& matrix, int64_t out_rows, CUdeviceptr x,
                              CUdeviceptr row_index, CUdeviceptr out, int64_t num_tokens) {
    kernel.launch(stream_, {.x = divide_up(out_rows, kernel.constant("ROWS"))},
                  {{"x", x},
                   {"row_index", row_index},
                   {"weight", arena_.at(matrix.weight)},
                   {"scales", arena_.at(matrix.scales)},
                   {"factors", arena_.at(matrix.factors)},
                   {"out", out},
                   {"rows", i32(out_rows)},
                   {"cols", i32(matrix.cols)},
                   {"num_tokens", i32(num_tokens)}});
}

CUdeviceptr GraphStep::pages(const CudaAttention& attention) const {
    return arena_.at(cache_[attention.place.group_index],
                     attention.place.group_layer * layer_bytes(plan_.paged[attention.place.group_index]));
}

int64_t GraphStep::layer_bytes(const PagedKvGroup& group) const {
    return (group.num_blocks + 1) * 2 * group.num_kv_heads * plan_.page_tokens * group.head_dim * kBF16Bytes;
}

}  // namespace gemma2_fast
