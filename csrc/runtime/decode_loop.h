#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
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

// The only loop over steps, on a thread of its own: schedule, ModelStep::run, read the logits, events.
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
    void serve();
    bool take_requests();
    void step();
    bool step_chooses(std::span<const Chunk> chunks) const;
    std::span<float> choose_on_step(std::span<const Chunk> chunks);
    std::span<float> logits_rows(int64_t num_rows);
    std::optional<TokenEvent> end_or_advance(const Chunk& chunk, std::span<const float> logits,
                                             const std::optional<std::string>& failure);
    void end_all(FinishReason reason, const std::string& message);
    void publish();

    std::shared_ptr<ModelStep> model_step_;
    const Limits limits_;

    // The loop's thread only.
    Scheduler scheduler_;
    LogitsReader reader_;
    AlignedBuffer<float> logits_;
    std::vector<TokenChoice> choices_;
    std::vector<int32_t> tokens_;  // what the model step chose, a row each; empty where it gave logits
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
