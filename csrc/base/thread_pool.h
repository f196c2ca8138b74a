#pragma once

#include <cstdint>
#include <memory>

#include "base/function_ref.h"

namespace gemma2_fast {

// A fixed set of threads (the caller counts as one). Each starts on its own run of consecutive tasks and then helps the
// others, task by task: a virtual CPU may be taken away at any time. Which thread runs a task must not change its
// result. Waiting threads spin briefly, then sleep.
class ThreadPool {
  public:
    explicit ThreadPool(int num_threads);  // throws Error unless 1 <= num_threads <= 1024
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int num_threads() const;

    // Runs body(task_index, thread_index) once for every task in [0, num_tasks) and returns when all are done.
    // Called from one thread at a time; body must not throw and must not call parallel_for.
    void parallel_for(int64_t num_tasks, FunctionRef<void(int64_t task_index, int thread_index)> body);

  private:
    struct State;
    std::unique_ptr<State> state_;
};

}  // namespace gemma2_fast
