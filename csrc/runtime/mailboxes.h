#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "runtime/token_event.h"

namespace gemma2_fast {

// Where the loop leaves each sequence's events until somebody collects them. Every function may be called from any
// thread.
class Mailboxes {
  public:
    void open(int64_t sequence_id);
    void drop(int64_t sequence_id);              // with everything in it; later events of the sequence are thrown away
    void post(std::vector<TokenEvent>& events);  // leaves it empty

    // The sequence's new events, oldest first; empty if none came in time. Collecting the last one closes the mailbox;
    // a sequence without one throws RequestError.
    std::vector<TokenEvent> wait(int64_t sequence_id, std::chrono::nanoseconds timeout);

  private:
    struct Mailbox {
        std::vector<TokenEvent> events;
        bool closed = false;
        std::condition_variable arrived;
    };

    std::mutex mutex_;
    std::unordered_map<int64_t, std::shared_ptr<Mailbox>> boxes_;
};

}  // namespace gemma2_fast
