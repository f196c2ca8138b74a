#include "runtime/decode_loop.h"

#include <algorithm>
#include <new>
#include <string>
#include <utility>

#include "base/errors.h"

namespace gemma2_fast {

DecodeLoop::DecodeLoop(std::shared_ptr<ModelStep> step, CachePlan plan, const Limits& limits)
    : model_step_(std::move(step)), limits_(limits), scheduler_(std::move(plan), limits), reader_(limits) {
    if (!model_step_) throw BackendError("the decode loop needs a model step, got none");
    publish();
    thread_ = std::thread(&DecodeLoop::serve, this);
}

DecodeLoop::~DecodeLoop() { close(); }

void DecodeLoop::serve() {
    while (take_requests()) {
        try {
            step();
        } catch (const std::exception& error) {  // not the model's doing, but nobody may wait for ever
            end_all(FinishReason::kError, std::string("the decode loop failed: ") + error.what());
        }
        publish();
    }
    end_all(FinishReason::kCancelled, "the decode loop was closed");
    publish();
}

void DecodeLoop::step() {
    const std::span<const Chunk> chunks = scheduler_.schedule();
    if (chunks.empty()) return;
    for (const Chunk& chunk : chunks)
        (chunk.sequence->decoding() ? counters_.num_decode_tokens : counters_.num_prefill_tokens) += chunk.num_tokens;
    publish();  // a step may be long, and the counters are true during it

    std::span<float> logits;
    std::optional<std::string> failure;
    try {
        if (step_chooses(chunks)) {
            logits = choose_on_step(chunks);
        } else {
            tokens_.clear();
            logits = logits_rows(scheduler_.batch().num_logits());
            model_step_->run(scheduler_.batch(), logits);
        }
    } catch (const std::bad_alloc&) {
        failure = "not enough memory for " + std::to_string(scheduler_.batch().num_logits()) +
                  " rows of logits; lower max_batch_size or max_step_tokens";
    } catch (const std::exception& error) {
        failure = error.what();
    }
    counters_.num_steps += 1;
    last_step_ = std::chrono::steady_clock::now();

    for (const Chunk& chunk : chunks) {
        std::optional<TokenEvent> event = end_or_advance(chunk, logits, failure);
        if (!event) continue;
        if (event->finish_reason) scheduler_.remove(event->sequence_id);
        events_.push_back(std::move(*event));
    }
}

std::optional<TokenEvent> DecodeLoop::end_or_advance(const Chunk& chunk, std::span<const float> logits,
                                                     const std::optional<std::string>& failure) {
    const int64_t id = chunk.sequence->id;
    if (failure) return last_event(id, FinishReason::kError, "the step failed: " + *failure);
    try {
        if (tokens_.empty()) return reader_.read(chunk, logits);
        if (chunk.num_rows == 0) return reader_.accept(chunk, std::nullopt);
        const int32_t token_id = tokens_[chunk.first_row];
        return token_id == kHostChooses ? reader_.read(chunk, logits) : reader_.accept(chunk, token_id);
    } catch (const std::exception& error) {
        return last_event(id, FinishReason::kError, std::string("reading the logits failed: ") + error.what());
    }
}

bool DecodeLoop::step_chooses(std::span<const Chunk> chunks) const {
    return model_step_->can_choose() && scheduler_.batch().num_logits() > 0 &&
           std::ranges::all_of(chunks, LogitsReader::needs_only_a_choice);
}

// Leaves the tokens of the step's rows in tokens_; gives the rows where the host has to choose one of them.
std::span<float> DecodeLoop::choose_on_step(std::span<const Chunk> chunks) {
    choices_.clear();
    for (const Chunk& chunk : chunks)
        if (chunk.num_rows > 0)
            choices_.push_back(
                {&chunk.sequence->request.sampling, static_cast<uint64_t>(chunk.sequence->num_generated())});
    tokens_.assign(choices_.size(), kHostChooses);
    model_step_->choose(scheduler_.batch(), choices_, tokens_);
    if (std::ranges::find(tokens_, kHostChooses) == tokens_.end()) return {};
    const std::span<float> logits = logits_rows(static_cast<int64_t>(tokens_.size()));
    model_step_->copy_logits(logits);
    return logits;
}

// Grows to what steps really ask for: few rows are needed unless prompt logits are.
std::span<float> DecodeLoop::logits_rows(int64_t num_rows) {
    const auto count = static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(limits_.vocab_size);
    if (count > logits_.size()) {
        logits_ = AlignedBuffer<float>();  // the old one first, so that both never exist together
        logits_ = AlignedBuffer<float>(count);
    }
    return logits_.span().first(count);
}

// Sleeps until there is something to compute; false once the loop is to close.
bool DecodeLoop::take_requests() {
    while (true) {
        std::vector<std::unique_ptr<Sequence>> submitted;
        std::vector<int64_t> cancelled;
        {
            std::unique_lock lock(mutex_);
            wake_.wait(lock,
                       [&] { return closing_ || !submitted_.empty() || !cancelled_.empty() || scheduler_.has_work(); });
            if (closing_) return false;
            submitted.swap(submitted_);
            cancelled.swap(cancelled_);
            published_.num_waiting += static_cast<int64_t>(submitted.size());  // never uncounted on their way
        }
        for (auto& sequence : submitted) scheduler_.add(std::move(sequence));
        for (int64_t id : cancelled)
            if (scheduler_.remove(id)) events_.push_back(last_event(id, FinishReason::kCancelled, "cancelled"));
        if (!cancelled.empty()) publish();
        if (scheduler_.has_work()) return true;
    }
}

void DecodeLoop::end_all(FinishReason reason, const std::string& message) {
    std::vector<std::unique_ptr<Sequence>> submitted;
    {
        const std::lock_guard lock(mutex_);
        if (closing_) submitted.swap(submitted_);
    }
    for (const auto& sequence : submitted) events_.push_back(last_event(sequence->id, reason, message));
    while (const auto sequence = scheduler_.remove_any()) events_.push_back(last_event(sequence->id, reason, message));
}

// Counters first: whoever sees a sequence's last event also sees its blocks free.
void DecodeLoop::publish() {
    const CacheLedger& cache = scheduler_.cache();
    counters_.num_running = scheduler_.num_running();
    counters_.num_waiting = scheduler_.num_waiting();
    counters_.num_preemptions = scheduler_.num_preemptions();
    counters_.groups.resize(cache.plan().paged.size());
    for (std::size_t g = 0; g < counters_.groups.size(); ++g)
        counters_.groups[g] = {cache.pool(g).num_blocks(), cache.pool(g).num_free(), cache.peak_held(g)};
    {
        const std::lock_guard lock(mutex_);
        published_ = counters_;
        published_step_ = last_step_;
    }
    mailboxes_.post(events_);
}

int64_t DecodeLoop::submit(Request request) {
    check_request(request, limits_);
    auto sequence = std::make_unique<Sequence>(0, std::move(request), limits_);
    scheduler_.cache().check_fits(*sequence);
    {
        const std::lock_guard lock(mutex_);
        if (!closing_) {
            const int64_t id = sequence->id = next_id_++;
            mailboxes_.open(id);
            submitted_.push_back(std::move(sequence));
            wake_.notify_one();
            return id;
        }
    }
    throw BackendError("the decode loop is closed and takes no more requests; make a new one");
}

void DecodeLoop::cancel(int64_t sequence_id) {
    const std::lock_guard lock(mutex_);
    if (closing_) return;
    cancelled_.push_back(sequence_id);
    wake_.notify_one();
}

void DecodeLoop::forget(int64_t sequence_id) {
    mailboxes_.drop(sequence_id);
    cancel(sequence_id);
}

std::vector<TokenEvent> DecodeLoop::wait(int64_t sequence_id, std::chrono::nanoseconds timeout) {
    return mailboxes_.wait(sequence_id, timeout);
}

LoopStats DecodeLoop::stats() const {
    const std::lock_guard lock(mutex_);
    LoopStats stats = published_;
    stats.num_waiting += static_cast<int64_t>(submitted_.size());
    if (published_step_)
        stats.last_step_age_s =
            std::chrono::duration<double>(std::chrono::steady_clock::now() - *published_step_).count();
    return stats;
}

void DecodeLoop::close() {
    if (on_own_thread()) throw BackendError("the decode loop cannot be closed from inside a step; close it elsewhere");
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
        wake_.notify_one();
    }
    std::call_once(joined_, [&] {
        thread_.join();
        model_step_.reset();
    });
}

}  // namespace gemma2_fast
