#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/aligned_buffer.h"
#include "runtime/logits_reader.h"
#include "runtime/mailboxes.h"
#include "runtime/model_step.h"
#include "runtime/scheduler.h"

namespace gemma2_fast {

struct GroupStats {
    int64_t num_blocks = 0;
    int64_t num_free = 0;
    int64_t peak_held = 0;  // by any one sequence, since the start
};

struct LoopStats {
    int64_t num_running = 0;
    int64_t num_waiting = 0;
    std::vector<GroupStats> groups;
    int64_t num_steps = 0;
    int64_t num_preemptions = 0;
    int64_t num_prefill_tokens = 0;  // recomputed ones included
    int64_t num_decode_tokens = 0;
    std::optional<double> last_step_age_s;  // absent before the first step
};

// The only loop over steps, on a thread of its own: schedule, ModelStep::run, read the logits, events. Where the model
// step chooses tokens itself, the next step is started before the tokens of the one before are known here.
// Every public function may be called from any thread but the loop's.
class DecodeLoop {
  public:
    DecodeLoop(std::shared_ptr<ModelStep> step, CachePlan plan, const Limits& limits);
    ~DecodeLoop();
    DecodeLoop(const DecodeLoop&) = delete;
    DecodeLoop& operator=(const DecodeLoop&) = delete;

    // Throws RequestError for what can never be served, CapacityError for what can never fit, BackendError when closed.
    int64_t submit(Request request);
    // Takes effect before the next step; the last event says kCancelled, unless the sequence ended before. Unknown ids
    // and ended sequences are left alone.
    void cancel(int64_t sequence_id);
    // Cancels and throws away what is not collected: for a reader that will not come back.
    void forget(int64_t sequence_id);
    std::vector<TokenEvent> wait(int64_t sequence_id, std::chrono::nanoseconds timeout);
    LoopStats stats() const;
    // Ends every sequence with kCancelled, joins the thread and lets go of the model step. Events can still be
    // collected. Throws BackendError on the loop's own thread, which cannot wait for itself.
    void close();
    bool on_own_thread() const { return std::this_thread::get_id() == thread_.get_id(); }

  private:
    struct StartedChunk {
        int64_t sequence_id = 0;
        int64_t end_position = 0;    // where the next token stands, if it has a row
        std::optional<int64_t> row;  // of the step's tokens
    };
    struct StartedStep {
        std::vector<StartedChunk> chunks;
        int64_t num_rows = 0;
        std::optional<std::string> failure;  // why it could not be started
    };

    void serve();
    bool take_requests();
    bool has_work() const { return scheduler_.has_work() || !started_.empty(); }
    void step();
    bool can_run_ahead() const;
    void begin_next();
    void run(std::span<const Chunk> chunks);
    std::optional<TokenEvent> read(const Chunk& chunk, std::span<const float> logits);
    void start(std::span<const Chunk> chunks);
    void finish_first();
    void settle(const StartedChunk& chunk, std::span<const float> logits);
    void leave_to_host(const StartedChunk& chunk, Sequence& sequence);
    void abandon_started();
    std::span<float> logits_rows(int64_t num_rows);
    void end_sequence(int64_t sequence_id, const std::string& failure);
    void tell(std::optional<TokenEvent> event);
    void count_step();
    void end_all(FinishReason reason, const std::string& message);
    void publish();

    std::shared_ptr<ModelStep> model_step_;
    const Limits limits_;

    // The loop's thread only.
    Scheduler scheduler_;
    LogitsReader reader_;
    AlignedBuffer<float> logits_;
    std::vector<TokenChoice> choices_;
    std::vector<int32_t> tokens_;      // what the model step chose, a row each
    std::deque<StartedStep> started_;  // at most two, the older first
    std::vector<TokenEvent> events_;
    LoopStats counters_;
    std::optional<std::chrono::steady_clock::time_point> last_step_;

    Mailboxes mailboxes_;

    // Shared. No sequence may be destroyed under the mutex: its logits_owner may have to wait for Python.
    mutable std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::unique_ptr<Sequence>> submitted_;
    std::vector<int64_t> cancelled_;
    int64_t next_id_ = 0;
    bool closing_ = false;
    LoopStats published_;
    std::optional<std::chrono::steady_clock::time_point> published_step_;

    std::once_flag joined_;
    std::thread thread_;  // last: everything it uses exists before it starts
};

}  // namespace gemma2_fast
