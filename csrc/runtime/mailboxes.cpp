#include "runtime/mailboxes.h"

#include <string>
#include <utility>

#include "base/errors.h"

namespace gemma2_fast {

void Mailboxes::open(int64_t sequence_id) {
    const std::lock_guard lock(mutex_);
    boxes_.emplace(sequence_id, std::make_shared<Mailbox>());
}

void Mailboxes::drop(int64_t sequence_id) {
    const std::lock_guard lock(mutex_);
    const auto it = boxes_.find(sequence_id);
    if (it == boxes_.end()) return;
    it->second->closed = true;
    it->second->arrived.notify_all();
    boxes_.erase(it);
}

void Mailboxes::post(std::vector<TokenEvent>& events) {
    const std::lock_guard lock(mutex_);
    for (TokenEvent& event : events) {
        const auto it = boxes_.find(event.sequence_id);
        if (it == boxes_.end()) continue;
        it->second->events.push_back(std::move(event));
        it->second->arrived.notify_all();
    }
    events.clear();
}

std::vector<TokenEvent> Mailboxes::wait(int64_t sequence_id, std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    const auto it = boxes_.find(sequence_id);
    if (it == boxes_.end())
        throw RequestError("sequence " + std::to_string(sequence_id) +
                           " has no events to wait for: it was never submitted, or its last event was collected");
    const std::shared_ptr<Mailbox> box = it->second;  // outlives a drop by another thread
    box->arrived.wait_for(lock, timeout, [&] { return box->closed || !box->events.empty(); });
    std::vector<TokenEvent> events = std::exchange(box->events, {});
    if (!events.empty() && events.back().finish_reason) {
        box->closed = true;
        box->arrived.notify_all();
        boxes_.erase(sequence_id);
    }
    return events;
}

}  // namespace gemma2_fast
