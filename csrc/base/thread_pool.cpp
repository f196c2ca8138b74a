#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>
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

// Tasks that nobody has claimed yet, in one word, so that both ends can be claimed: the first task in the lower half,
// the end in the upper.
class Share {
  public:
    bool empty() const { return is_empty(range_.load()); }
    void fill(int64_t first, int64_t end) { range_ = static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(first); }

    std::optional<int64_t> claim_first() {
        for (uint64_t range = range_.load(); !is_empty(range);)
            if (range_.compare_exchange_weak(range, range + 1)) return range & kHalf;
        return std::nullopt;
    }
    std::optional<int64_t> claim_last() {
        for (uint64_t range = range_.load(); !is_empty(range);)
            if (range_.compare_exchange_weak(range, range - (uint64_t{1} << 32))) return (range >> 32) - 1;
        return std::nullopt;
    }

  private:
    static constexpr uint64_t kHalf = UINT32_MAX;
    static bool is_empty(uint64_t range) { return (range & kHalf) == range >> 32; }

    alignas(64) std::atomic<uint64_t> range_{0};
};

}  // namespace

// Each thread has a share of consecutive tasks and takes them in order, because consecutive tasks mostly read
// consecutive memory; who has none left takes the last ones of others. A thread that was off its processor for long
// holds up nothing but the task it runs: others empty its share. What belongs to a round is read after a claim and
// stays until that task is reported done, so a claim that comes late claims rightly whatever round it meets.
struct ThreadPool::State {
    using Body = FunctionRef<void(int64_t, int)>;

    explicit State(int num_threads) : shares(static_cast<std::size_t>(num_threads)) {}

    std::vector<Share> shares;
    std::atomic<int64_t> unfinished{0};
    const Body* body = nullptr;

    // A sleeper announces itself before it looks a last time; who changes the state looks for sleepers afterwards. Both
    // in sequentially consistent order, so at least one sees the other.
    std::mutex mutex;
    std::condition_variable work_came;
    std::condition_variable work_done;
    std::atomic<int> sleeping_workers{0};
    std::atomic<bool> sleeping_caller{false};
    std::atomic<bool> stopping{false};

    std::vector<std::thread> workers;

    ~State() {
        {
            std::lock_guard lock(mutex);
            stopping = true;
        }
        work_came.notify_all();
        for (std::thread& worker : workers) worker.join();
    }

    bool has_work() const {
        return stopping || std::ranges::any_of(shares, [](const Share& share) { return !share.empty(); });
    }

    std::optional<int64_t> claim(std::size_t thread_index) {
        if (const auto task = shares[thread_index].claim_first()) return task;
        for (std::size_t i = 1; i < shares.size(); ++i)
            if (const auto task = shares[(thread_index + i) % shares.size()].claim_last()) return task;
        return std::nullopt;
    }

    void run_tasks(int thread_index) {
        while (const auto task = claim(static_cast<std::size_t>(thread_index))) {
            (*body)(*task, thread_index);
            if (unfinished.fetch_sub(1) == 1 && sleeping_caller) {
                std::lock_guard lock(mutex);
                work_done.notify_one();
            }
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
        unfinished = tasks;
        const auto num_shares = static_cast<int64_t>(shares.size());
        for (int64_t i = num_shares - 1; i >= 0; --i)  // the caller's last: until then a worker would find only that
            shares[i].fill(tasks * i / num_shares, tasks * (i + 1) / num_shares);
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
    state_ = std::make_unique<State>(num_threads);
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
