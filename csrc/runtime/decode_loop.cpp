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
            abandon_started();
            end_all(FinishReason::kError, std::string("the decode loop failed: ") + error.what());
        }
        publish();
    }
    abandon_started();
    end_all(FinishReason::kCancelled, "the decode loop was closed");
    publish();
}

void DecodeLoop::step() {
    const bool has_started = !started_.empty();
    if (!has_started || can_run_ahead()) begin_next();
    if (has_started) finish_first();
}

// Whether the next step depends on the one before by nothing but tokens that the model step chooses.
bool DecodeLoop::can_run_ahead() const {
    return !started_.back().failure && scheduler_.all_of([&](const Sequence& sequence) {
        return !sequence.host_chooses && LogitsReader::needs_only_a_choice(sequence) &&
               model_step_->always_chooses(sequence.request.sampling);
    });
}

void DecodeLoop::begin_next() {
    const std::span<const Chunk> chunks = scheduler_.schedule();
    if (chunks.empty()) return;
    for (const Chunk& chunk : chunks)
        (chunk.sequence->decoding() ? counters_.num_decode_tokens : counters_.num_prefill_tokens) += chunk.num_tokens;
    publish();  // a step may be long, and the counters are true during it
    const bool chooses = model_step_->can_choose() && std::ranges::all_of(chunks, [](const Chunk& chunk) {
                             return LogitsReader::needs_only_a_choice(*chunk.sequence);
                         });
    chooses ? start(chunks) : run(chunks);
}

void DecodeLoop::run(std::span<const Chunk> chunks) {
    std::span<float> logits;
    std::optional<std::string> failure;
    try {
        logits = logits_rows(scheduler_.batch().num_logits());
        model_step_->run(scheduler_.batch(), logits);
    } catch (const std::exception& error) {
        failure = error.what();
    }
    count_step();
    for (const Chunk& chunk : chunks) {
        if (failure)
            end_sequence(chunk.sequence->id, "the step failed: " + *failure);
        else
            tell(read(chunk, logits));
    }
}

std::optional<TokenEvent> DecodeLoop::read(const Chunk& chunk, std::span<const float> logits) {
    try {
        return reader_.read(chunk, logits);
    } catch (const std::exception& error) {
        return last_event(chunk.sequence->id, FinishReason::kError,
                          std::string("reading the logits failed: ") + error.what());
    }
}

// Its sequences go on at once, as if their next tokens were known.
void DecodeLoop::start(std::span<const Chunk> chunks) {
    StartedStep step;
    choices_.clear();
    for (const Chunk& chunk : chunks) {
        const Sequence& sequence = *chunk.sequence;
        step.chunks.push_back({sequence.id, sequence.computed_tokens + chunk.num_tokens, std::nullopt});
        if (chunk.num_rows == 0) continue;
        step.chunks.back().row = chunk.first_row;
        choices_.push_back({&sequence.request.sampling, static_cast<uint64_t>(sequence.num_generated())});
    }
    step.num_rows = static_cast<int64_t>(choices_.size());
    try {
        model_step_->start(scheduler_.batch(), choices_);
    } catch (const std::exception& error) {
        step.failure = error.what();
    }
    started_.push_back(std::move(step));
    if (!started_.back().failure) std::ranges::for_each(chunks, LogitsReader::advance);
}

void DecodeLoop::finish_first() {
    StartedStep step = std::move(started_.front());
    started_.pop_front();
    std::span<float> logits;
    try {
        if (step.failure) throw BackendError(*step.failure);
        tokens_.assign(static_cast<std::size_t>(step.num_rows), kHostChooses);
        model_step_->finish(tokens_);
        const auto is_left = [&](const StartedChunk& chunk) {
            return chunk.row && tokens_[*chunk.row] == kHostChooses;
        };
        // Once another step was started, its logits are there.
        if (started_.empty() && std::ranges::any_of(step.chunks, is_left)) {
            logits = logits_rows(step.num_rows);
            model_step_->copy_logits(logits);
        }
    } catch (const std::exception& error) {
        step.failure = error.what();
    }
    count_step();
    if (step.failure) {
        for (const StartedStep& later : started_)
            step.chunks.insert(step.chunks.end(), later.chunks.begin(), later.chunks.end());
        started_.clear();
        for (const StartedChunk& chunk : step.chunks)
            end_sequence(chunk.sequence_id, "the step failed: " + *step.failure);
        return;
    }
    for (const StartedChunk& chunk : step.chunks) settle(chunk, logits);
}

void DecodeLoop::settle(const StartedChunk& chunk, std::span<const float> logits) {
    Sequence* sequence = scheduler_.find(chunk.sequence_id);
    if (!sequence) return;  // it ended in the meantime
    if (!chunk.row) return tell(LogitsReader::settle(*sequence, chunk.end_position, std::nullopt));
    const int32_t token_id = tokens_[*chunk.row];
    if (token_id != kHostChooses) return tell(LogitsReader::settle(*sequence, chunk.end_position, token_id));
    if (logits.empty()) return leave_to_host(chunk, *sequence);
    sequence->host_chooses = true;
    try {
        tell(reader_.settle_by_logits(*sequence, logits.subspan(*chunk.row * limits_.vocab_size, limits_.vocab_size)));
    } catch (const std::exception& error) {
        end_sequence(sequence->id, std::string("reading the logits failed: ") + error.what());
    }
}

// A damaged row, or what the model step did not promise to choose: the logits are gone, and the step ahead went on with
// a token that is none. So all is computed once more, then without a step ahead.
void DecodeLoop::leave_to_host(const StartedChunk& chunk, Sequence& sequence) {
    sequence.host_chooses = true;
    sequence.token_ids.resize(static_cast<std::size_t>(chunk.end_position));
    scheduler_.restart(sequence);
    for (StartedStep& ahead : started_)
        std::erase_if(ahead.chunks, [&](const StartedChunk& other) { return other.sequence_id == sequence.id; });
}

// Whoever uses the model step next must find none that was started and not finished.
void DecodeLoop::abandon_started() {
    for (const StartedStep& step : started_) {
        if (step.failure) continue;
        tokens_.assign(static_cast<std::size_t>(step.num_rows), kHostChooses);
        try {
            model_step_->finish(tokens_);
        } catch (const std::exception&) {
            break;  // which ends those after it, too
        }
    }
    started_.clear();
}

void DecodeLoop::end_sequence(int64_t sequence_id, const std::string& failure) {
    if (scheduler_.find(sequence_id)) tell(last_event(sequence_id, FinishReason::kError, failure));
}

void DecodeLoop::tell(std::optional<TokenEvent> event) {
    if (!event) return;
    if (event->finish_reason) scheduler_.remove(event->sequence_id);
    events_.push_back(std::move(*event));
}

void DecodeLoop::count_step() {
    counters_.num_steps += 1;
    last_step_ = std::chrono::steady_clock::now();
}

// Grows to what steps really ask for: few rows are needed unless prompt logits are.
std::span<float> DecodeLoop::logits_rows(int64_t num_rows) {
    const auto count = static_cast<std::size_t>(num_rows) * static_cast<std::size_t>(limits_.vocab_size);
    if (count <= logits_.size()) return logits_.span().first(count);
    try {
        logits_ = AlignedBuffer<float>();  // the old one first, so that both never exist together
        logits_ = AlignedBuffer<float>(count);
    } catch (const std::bad_alloc&) {
        throw CapacityError("not enough memory for " + std::to_string(num_rows) +
                            " rows of logits; lower max_batch_size or max_step_tokens");
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
            wake_.wait(lock, [&] { return closing_ || !submitted_.empty() || !cancelled_.empty() || has_work(); });
            if (closing_) return false;
            submitted.swap(submitted_);
            cancelled.swap(cancelled_);
            published_.num_waiting += static_cast<int64_t>(submitted.size());  // never uncounted on their way
        }
        for (auto& sequence : submitted) scheduler_.add(std::move(sequence));
        for (int64_t id : cancelled)
            if (scheduler_.remove(id)) events_.push_back(last_event(id, FinishReason::kCancelled, "cancelled"));
        if (!cancelled.empty()) publish();
        if (has_work()) return true;
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
