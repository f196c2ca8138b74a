#include "cuda/graph_step.h"

#include <algorithm>
#include <cmath>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

StepSizes sizes_of(const GraphStep::Options& options) {
    const int64_t sequences = power_of_two(options.max_sequences);
    return {.max_tokens = std::max(options.limits.max_step_tokens, sequences),
            .max_sequences = sequences,
            .max_logits = std::max(options.limits.max_logits_rows, sequences),
            .max_seq_len = options.max_seq_len};
}

}  // namespace

GraphStep::GraphStep(std::shared_ptr<const Device> device, const ModelSpec& spec, const CachePlan& plan,
                     std::map<std::string, DeviceFormat> formats, std::vector<KernelImage> kernels,
                     const Options& options)
    : device_(std::move(device)),
      lifetime_guard_(std::in_place, *device_),
      options_(options),
      plan_(plan),
      weights_(std::move(formats), arena_),
      kernels_(*device_, std::move(kernels)),
      model_(spec, plan, sizes_of(options), device_->num_multiprocessors(), kernels_, weights_, arena_),
      chooser_(spec.vocab_size, spec.final_softcap, sizes_of(options).max_logits, kernels_, arena_),
      inputs_(*device_, plan, sizes_of(options), spec.vocab_size, model_.query_room(), arena_),
      stream_(*device_),
      sides_{Side(*device_, sizes_of(options).max_logits), Side(*device_, sizes_of(options).max_logits)} {
    if (options.allocates) allocate();
    lifetime_guard_.reset();
}

void GraphStep::allocate() {
    arena_.allocate(*device_, "weights, cache and activations");
    const Arena::Slice& arrivals = model_.split_scratch().arrivals;
    stream_.fill(arena_.at(arrivals), 0, arrivals.num_bytes);
    uploader_ = std::make_unique<Uploader>(stream_);
    upload_rope_tables();
}

GraphStep::~GraphStep() {
    try {
        lifetime_guard_.emplace(*device_);
        stream_.wait();  // nothing is freed under a running kernel
    } catch (const std::exception&) {
        // A lost device runs nothing, and frees its memory itself.
    }
}

void GraphStep::upload_rope_tables() {
    for (const CudaModel::RopeTable& rope : model_.ropes()) {
        std::vector<float> cos, sin;
        for (int64_t position = 0; position < options_.max_seq_len; ++position)
            for (const float frequency : rope.spec.inverse_frequencies) {
                const float angle = static_cast<float>(position) * frequency;
                cos.push_back(std::cos(angle));
                sin.push_back(std::sin(angle));
            }
        const auto copy = [&](const Arena::Slice& table, const std::vector<float>& values) {
            uploader_->copy(arena_.at(table), reinterpret_cast<const std::byte*>(values.data()), table.num_bytes);
        };
        copy(rope.tables.cos, cos);
        copy(rope.tables.sin, sin);
    }
}

void GraphStep::upload(const std::string& name, const std::string& part, std::span<const std::byte> bytes) {
    const Arena::Slice place = weights_.place(name, part);
    if (static_cast<int64_t>(bytes.size()) != place.num_bytes)
        throw Error("weights: " + part + " of " + name + " has " + std::to_string(bytes.size()) + " bytes, expected " +
                    std::to_string(place.num_bytes));
    if (!uploader_) throw Error("weights: " + name + " came before memory was there or after the upload was finished");
    const DeviceGuard guard(*device_);
    uploader_->copy(arena_.at(place), bytes.data(), place.num_bytes);
    uploaded_.emplace(name, part);
}

void GraphStep::finish_upload() {
    std::string missing;
    for (const auto& [name, part] : weights_.parts())
        if (!uploaded_.contains({name, part})) missing += (missing.empty() ? "" : ", ") + name + " (" + part + ")";
    if (!missing.empty()) throw Error("weights: not uploaded: " + missing);
    const DeviceGuard guard(*device_);
    stream_.wait();
    uploader_.reset();
}

void GraphStep::poison_cache() {
    const DeviceGuard guard(*device_);
    for (const Arena::Slice& slice : model_.cache()) stream_.fill(arena_.at(slice), 0xff, slice.num_bytes);
    stream_.wait();
}

void GraphStep::run(const StepBatch& batch, std::span<float> logits) {
    const DeviceGuard guard(*device_);
    if (num_started_ > 0) throw Error("a step was started and not finished");
    check(batch, static_cast<int64_t>(logits.size()));
    put_on_stream(batch, {});
    copy_logits(logits);
}

void GraphStep::start(const StepBatch& batch, std::span<const TokenChoice> choices) {
    const DeviceGuard guard(*device_);
    check(batch, batch.num_logits() * options_.limits.vocab_size);
    const auto num_rows = static_cast<int64_t>(choices.size());
    if (num_rows != batch.num_logits())
        throw Error(std::to_string(num_rows) + " choices for " + std::to_string(batch.num_logits()) +
                    " rows of logits");
    if (num_started_ == 2) throw Error("two steps were started and not finished; finish the first");
    put_on_stream(batch, choices);
    sides_[next_side_].num_rows = num_rows;
    next_side_ = 1 - next_side_;
    ++num_started_;
}

void GraphStep::finish(std::span<int32_t> tokens) {
    const DeviceGuard guard(*device_);
    if (num_started_ == 0) throw Error("no step was started");
    const Side& side = sides_[num_started_ == 1 ? 1 - next_side_ : next_side_];
    if (static_cast<int64_t>(tokens.size()) != side.num_rows)
        throw Error("the step has " + std::to_string(side.num_rows) + " rows, asked for " +
                    std::to_string(tokens.size()) + " tokens");
    try {
        side.done.wait();
    } catch (...) {
        num_started_ = 0;
        drain();
        throw;
    }
    --num_started_;
    std::copy_n(reinterpret_cast<const int32_t*>(side.tokens.data()), tokens.size(), tokens.begin());
}

void GraphStep::copy_logits(std::span<float> logits) {
    const DeviceGuard guard(*device_);
    if (!logits.empty())
        stream_.copy_to_host(logits.data(), arena_.at(model_.rows().logits), static_cast<int64_t>(logits.size_bytes()));
    stream_.wait();
}

void GraphStep::check(const StepBatch& batch, int64_t num_logit_values) const {
    const int64_t num_rows_before = num_started_ == 0 ? 0 : sides_[1 - next_side_].num_rows;
    check_batch(batch, plan_, options_.limits, num_logit_values, num_rows_before);
    const int64_t last_position = std::ranges::max(batch.positions);
    if (batch.num_sequences() > options_.max_sequences || last_position >= options_.max_seq_len)
        throw Error("step of " + std::to_string(batch.num_sequences()) + " sequences up to position " +
                    std::to_string(last_position) + ", planned for " + std::to_string(options_.max_sequences) +
                    " of up to " + std::to_string(options_.max_seq_len) + " tokens");
}

void GraphStep::put_on_stream(const StepBatch& batch, std::span<const TokenChoice> choices) {
    if (uploader_ || !options_.allocates) throw Error("weights: the upload is not finished");
    const StepShape shape = inputs_.shape(batch, !choices.empty());
    inputs_.fill(batch, choices, shape, next_side_);
    try {
        model_.copy_states(batch.state_copies, arena_, stream_);  // outside of graphs, which know no slots
        inputs_.copy(shape, next_side_, arena_, stream_);
        if (shape.is_decode && options_.captures)
            replay(shape);
        else
            enqueue(shape);
        const Side& side = sides_[next_side_];
        if (shape.chooses)
            stream_.copy_to_host(side.tokens.data(), arena_.at(model_.rows().chosen), batch.num_logits() * kI32Bytes);
        stream_.record(side.done);
    } catch (...) {
        drain();
        throw;
    }
}

// After an error: what was queued may still use host memory that the next step overwrites. The error itself is the one
// to tell.
void GraphStep::drain() { device_->driver().cuStreamSynchronize(stream_.handle()); }

void GraphStep::replay(const StepShape& shape) {
    std::unique_ptr<Graph>& graph = graphs_[shape];
    if (!graph) graph = std::make_unique<Graph>(*device_, stream_.capture([&] { enqueue(shape); }));
    stream_.launch(*graph);
}

void GraphStep::enqueue(const StepShape& shape) {
    const StepContext step{stream_, arena_, model_.rows(), shape, inputs_.addresses(shape, arena_)};
    model_.enqueue(step);
    if (shape.chooses) chooser_.enqueue(step);
}

}  // namespace gemma2_fast
