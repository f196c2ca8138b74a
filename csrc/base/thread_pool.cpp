#include "base/thread_pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "base/errors.h"

namespace gemma2_fast {
namespace {

constexpr int kMaxThreads = 1024;
constexpr auto kSpinTime = std::chrono::microseconds(40);  // a few times the cost of a sleep and a wake

void pause_briefly() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// True as soon as the condition holds; false when it has not come true within the spin time.
template <typename Condition>
bool spin_until(Condition condition) {
    const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    do {
        for (int i = 0; i < 32; ++i) {
            if (condition()) return true;
            pause_briefly();
        }
    } while (std::chrono::steady_clock::now() < deadline);
    return condition();
}

}  // namespace

// One word holds the round (upper half) and how many of its tasks nobody has claimed yet (lower half). A thread claims
// by counting it down, which fails if the round has moved on: a thread that was off its processor for long can neither
// hold up a round whose tasks others took, nor reach into the next one. What belongs to the round is read after a
// claim, and stays until that task is reported done.
struct ThreadPool::State {
    using Body = FunctionRef<void(int64_t, int)>;

    std::atomic<uint64_t> claims{0};
    std::atomic<int64_t> unfinished{0};
    const Body* body = nullptr;
    int64_t num_tasks = 0;

    // A sleeper announces itself before it looks a last time; who changes the state looks for sleepers afterwards. Both
    // in sequentially consistent order, so at least one sees the other.
    std::mutex mutex;
    std::condition_variable work_came;
    std::condition_variable work_done;
    std::atomic<int> sleeping_workers{0};
    std::atomic<bool> sleeping_caller{false};
    std::atomic<bool> stopping{false};

    std::vector<std::thread> workers;

    static uint64_t unclaimed(uint64_t word) { return word & 0xffffffffu; }

    ~State() {
        {
            std::lock_guard lock(mutex);
            stopping = true;
        }
        work_came.notify_all();
        for (std::thread& worker : workers) worker.join();
    }

    bool has_work() const { return unclaimed(claims) > 0 || stopping; }

    void run_tasks(int thread_index) {
        uint64_t word = claims.load();
        while (unclaimed(word) > 0) {
            if (!claims.compare_exchange_weak(word, word - 1)) continue;
            (*body)(num_tasks - static_cast<int64_t>(unclaimed(word)), thread_index);
            if (unfinished.fetch_sub(1) == 1 && sleeping_caller) {
                std::lock_guard lock(mutex);
                work_done.notify_one();
            }
            word = claims.load();
        }
    }

    void work(int thread_index) {
        while (!stopping) {
            if (!spin_until([this] { return has_work(); })) {
                std::unique_lock lock(mutex);
                ++sleeping_workers;
                work_came.wait(lock, [this] { return has_work(); });
                --sleeping_workers;
            }
            run_tasks(thread_index);
        }
    }

    void run_round(int64_t tasks, const Body& task_body) {
        body = &task_body;
        num_tasks = tasks;
        unfinished = tasks;
        const uint64_t round = (claims.load() >> 32) + 1;
        claims = round << 32 | static_cast<uint64_t>(tasks);
        if (sleeping_workers > 0) {
            {
                std::lock_guard lock(mutex);
            }
            work_came.notify_all();
        }
        run_tasks(0);
        if (spin_until([this] { return unfinished == 0; })) return;
        std::unique_lock lock(mutex);
        sleeping_caller = true;
        work_done.wait(lock, [this] { return unfinished == 0; });
        sleeping_caller = false;
    }
};

ThreadPool::ThreadPool(int num_threads) {
    if (num_threads < 1 || num_threads > kMaxThreads)
        throw Error("a thread pool has 1 to " + std::to_string(kMaxThreads) + " threads, not " +
                    std::to_string(num_threads));
    state_ = std::make_unique<State>();
    try {
        for (int i = 1; i < num_threads; ++i) state_->workers.emplace_back(&State::work, state_.get(), i);
    } catch (const std::system_error& error) {
        throw CapacityError("the system gave only " + std::to_string(state_->workers.size() + 1) + " of " +
                            std::to_string(num_threads) + " threads (" + error.what() + "): ask for fewer");
    }
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::num_threads() const { return static_cast<int>(state_->workers.size()) + 1; }

void ThreadPool::parallel_for(int64_t num_tasks, FunctionRef<void(int64_t task_index, int thread_index)> body) {
    if (num_tasks <= 1 || state_->workers.empty()) {
        for (int64_t task = 0; task < num_tasks; ++task) body(task, 0);
        return;
    }
    if (num_tasks > UINT32_MAX)
        throw Error("parallel_for takes up to 2^32 - 1 tasks, not " + std::to_string(num_tasks));
    state_->run_round(num_tasks, body);
}

}  // namespace gemma2_fast
