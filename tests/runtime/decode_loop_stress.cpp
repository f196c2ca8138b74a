// Eight concurrent streams over a fake model step, with cancellations, forgotten readers, failing steps and a cache for
// a quarter of them. A plain program so that it runs under ThreadSanitizer and AddressSanitizer without Python.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "base/errors.h"
#include "runtime/block_pool.h"
#include "runtime/decode_loop.h"

using namespace gemma2_fast;

namespace {

constexpr int64_t kVocab = 61;
constexpr int64_t kPageTokens = 4;
constexpr int64_t kWindow = 9;
constexpr int64_t kMaxSeqLen = 64;
constexpr int32_t kFailing = 60;  // a step with this token throws
constexpr int kStreams = 8;

void require(bool holds, const std::string& what) {
    if (holds) return;
    std::fprintf(stderr, "decode_loop_stress: %s\n", what.c_str());
    std::abort();
}

// Pages hold tokens and their positions; the next token depends on every token the window lets a query see. One that
// chooses leaves every seventh row to the host, and tells of failures when it is finished.
class HistoryStep : public ModelStep {
  public:
    HistoryStep(const CachePlan& plan, bool chooses) : plan_(plan), chooses_(chooses) {
        for (const PagedKvGroup& group : plan.paged) pages_.emplace_back(group.num_blocks * kPageTokens);
    }

    void run(const StepBatch& batch, std::span<float> logits) override {
        for (int32_t token : batch.token_ids)
            if (token == kFailing) throw std::runtime_error("a token that this step cannot take");
        std::size_t row = 0;
        for (int64_t s = 0; s < batch.num_sequences(); ++s) {
            for (int32_t t = batch.first_token[s]; t < batch.first_token[s + 1]; ++t)
                for (std::size_t g = 0; g < pages_.size(); ++g)
                    entry(batch, g, s, batch.positions[t]) = {batch.positions[t], batch.token_ids[t]};
            for (; row < batch.logits_token.size() && batch.logits_token[row] < batch.first_token[s + 1]; ++row) {
                int64_t sum = 0;
                for (std::size_t g = 0; g < pages_.size(); ++g)
                    sum = sum * 7 + read(batch, g, s, batch.positions[batch.logits_token[row]]);
                for (int64_t v = 0; v < kVocab; ++v)
                    logits[row * kVocab + v] = v == sum % (kVocab - 1) ? 9.0f : static_cast<float>(v % 5);
            }
        }
    }

    bool can_choose() const override { return chooses_; }

    void start(const StepBatch& batch, std::span<const TokenChoice> choices) override {
        StepBatch known = batch;
        for (int32_t& token : known.token_ids)
            if (token < 0) token = std::max(started_.back().tokens.at(row_of_chosen(token)), 0);
        require(started_.size() < 2, "three steps were started");
        Started step{std::vector<int32_t>(choices.size()), !started_.empty() && started_.back().failed};
        logits_.resize(choices.size() * kVocab);
        try {
            if (!step.failed) run(known, logits_);
        } catch (const std::runtime_error&) {
            step.failed = true;
        }
        for (std::size_t row = 0; row < choices.size(); ++row) {
            const auto first = logits_.begin() + static_cast<std::ptrdiff_t>(row * kVocab);
            step.tokens[row] = ++num_chosen_ % 7 == 0 || step.failed
                                   ? kHostChooses
                                   : static_cast<int32_t>(std::max_element(first, first + kVocab) - first);
        }
        started_.push_back(std::move(step));
    }

    void finish(std::span<int32_t> tokens) override {
        const Started step = std::move(started_.front());
        started_.pop_front();
        if (step.failed) {
            started_.clear();
            throw std::runtime_error("a token that this step cannot take");
        }
        std::ranges::copy(step.tokens, tokens.begin());
    }

    void copy_logits(std::span<float> logits) override { std::ranges::copy(logits_, logits.begin()); }

  private:
    struct Started {
        std::vector<int32_t> tokens;
        bool failed;
    };
    struct Entry {
        int32_t position = -1;
        int32_t token = -1;
    };

    Entry& entry(const StepBatch& batch, std::size_t g, int64_t s, int64_t position) {
        const int64_t width = plan_.paged[g].table_width;
        const int32_t block = batch.block_table[g][s * width + position / kPageTokens % width];
        require(block != kNoBlock, "position " + std::to_string(position) + " has no block");
        return pages_[g][block * kPageTokens + position % kPageTokens];
    }

    int64_t read(const StepBatch& batch, std::size_t g, int64_t s, int64_t position) {
        const int64_t window = plan_.paged[g].window_keys.value_or(position + 1);
        int64_t sum = 0;
        for (int64_t p = std::max<int64_t>(0, position - window + 1); p <= position; ++p) {
            const Entry& key = entry(batch, g, s, p);
            require(key.position == p, "a visible key was overwritten");
            sum += (position - p + 1) * (key.token + 1);
        }
        return sum;
    }

    CachePlan plan_;
    bool chooses_;
    int64_t num_chosen_ = 0;
    std::deque<Started> started_;
    std::vector<float> logits_;
    std::vector<std::vector<Entry>> pages_;
};

CachePlan small_plan() {
    CachePlan plan;
    plan.page_tokens = kPageTokens;
    plan.paged.push_back({{0}, 1, 1, kWindow, 14, 7});
    plan.paged.push_back({{1}, 1, 1, std::nullopt, 36, 16});
    plan.recurrent = RecurrentStateGroup{{2}, 1, 3, 6};
    return plan;
}

std::vector<TokenEvent> collect(DecodeLoop& loop, int64_t id) {
    std::vector<TokenEvent> events;
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (events.empty() || !events.back().finish_reason) {
        require(std::chrono::steady_clock::now() < deadline, "a stream waited a minute for its next event");
        for (TokenEvent& event : loop.wait(id, std::chrono::milliseconds(200))) events.push_back(std::move(event));
    }
    return events;
}

std::vector<int32_t> ids_of(const std::vector<TokenEvent>& events) {
    std::vector<int32_t> ids;
    for (const TokenEvent& event : events)
        if (event.token_id) ids.push_back(*event.token_id);
    return ids;
}

Request request_of(int stream, int round) {
    Request request;
    for (int i = 0; i < 1 + (stream * 11 + round * 5) % 37; ++i)
        request.token_ids.push_back((stream * 17 + i * 7 + round) % (kVocab - 1));
    request.sampling.max_tokens = 20;
    if (round % 2 == 1) {
        request.sampling.temperature = 0.8f;
        request.sampling.top_p = 0.95f;
        request.sampling.repetition_penalty = 1.1f;
        request.sampling.seed = static_cast<uint64_t>(stream);
        request.num_prompt_logprobs = 2;
        request.num_logprobs = 1;
    }
    return request;
}

void run_stream(DecodeLoop& loop, DecodeLoop& unloaded, std::mutex& unloaded_turn, int stream, int num_rounds) {
    for (int round = 0; round < num_rounds; ++round) {
        Request request = request_of(stream, round);
        std::vector<float> prompt_logits(request.token_ids.size() * kVocab);
        if (round % 3 == 0) request.logits_out = prompt_logits;
        switch ((stream + round) % 5) {
            case 1: {
                const int64_t id = loop.submit(std::move(request));
                const std::vector<TokenEvent> events = loop.wait(id, std::chrono::milliseconds(stream % 3));
                if (!events.empty() && events.back().finish_reason) break;
                loop.cancel(id);
                collect(loop, id);
                break;
            }
            case 2:
                request.logits_out.reset();  // nobody will wait until the loop has let go of it
                loop.forget(loop.submit(std::move(request)));
                break;
            case 3: {
                request.token_ids.back() = kFailing;
                const auto events = collect(loop, loop.submit(std::move(request)));
                require(events.back().finish_reason == FinishReason::kError, "a failing step must end its sequences");
                break;
            }
            default: {
                const std::vector<TokenEvent> events = collect(loop, loop.submit(request));
                if (events.back().finish_reason == FinishReason::kError) break;  // shared a step with a failing one
                require(events.back().finish_reason == FinishReason::kLength, "a stream ended early");
                const std::lock_guard turn(unloaded_turn);
                request.logits_out.reset();
                const std::vector<TokenEvent> alone = collect(unloaded, unloaded.submit(std::move(request)));
                require(ids_of(events) == ids_of(alone), "a loaded run gave other ids than an unloaded one");
            }
        }
        const LoopStats stats = loop.stats();
        require(stats.num_running <= 6, "more sequences run than there are state slots");
    }
}

void check_concurrent_streams(int num_rounds, bool chooses) {
    const CachePlan plan = small_plan();
    DecodeLoop loop(std::make_shared<HistoryStep>(plan, chooses), plan, {8, 24, kMaxSeqLen, 16, kVocab, std::nullopt});
    DecodeLoop unloaded(std::make_shared<HistoryStep>(plan, false), plan,
                        {1, kMaxSeqLen, kMaxSeqLen, kMaxSeqLen, kVocab, std::nullopt});
    std::mutex unloaded_turn;
    std::vector<std::thread> streams;
    for (int stream = 0; stream < kStreams; ++stream)
        streams.emplace_back([&, stream] { run_stream(loop, unloaded, unloaded_turn, stream, num_rounds); });
    for (std::thread& stream : streams) stream.join();

    LoopStats stats = loop.stats();
    for (int i = 0; i < 5000 && stats.num_running + stats.num_waiting > 0; ++i, stats = loop.stats())
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    require(stats.num_running + stats.num_waiting == 0, "sequences are left");
    for (const GroupStats& group : stats.groups) require(group.num_free == group.num_blocks, "blocks are lost");
    require(stats.groups[0].peak_held <= plan.paged[0].table_width, "a window held more than its ring");
    std::printf("%d streams: %ld steps, %ld preemptions\n", kStreams, static_cast<long>(stats.num_steps),
                static_cast<long>(stats.num_preemptions));
}

void check_close_while_busy() {
    for (int round = 0; round < 20; ++round) {
        const CachePlan plan = small_plan();
        DecodeLoop loop(std::make_shared<HistoryStep>(plan, round % 2 == 1), plan,
                        {8, 24, kMaxSeqLen, 16, kVocab, std::nullopt});
        std::vector<std::thread> streams;
        std::atomic<int> num_refused = 0;
        for (int stream = 0; stream < kStreams; ++stream)
            streams.emplace_back([&, stream] {
                try {
                    while (true) collect(loop, loop.submit(request_of(stream, 0)));
                } catch (const BackendError&) {
                    ++num_refused;
                }
            });
        std::this_thread::sleep_for(std::chrono::milliseconds(round));
        std::thread other([&] { loop.close(); });
        loop.close();
        other.join();
        for (std::thread& stream : streams) stream.join();
        require(num_refused == kStreams, "a closed loop took a request");
    }
}

template <typename Action>
bool is_refused(Action action) {
    try {
        action();
    } catch (const std::logic_error&) {
        return true;
    }
    return false;
}

void check_block_pool() {
    BlockPool pool(2);
    const int32_t first = pool.take(7);
    const int32_t second = pool.take(8);
    require(first != second && pool.num_free() == 0, "two owners share a block");
    require(is_refused([&] { pool.take(9); }), "an empty pool gave a block");
    require(is_refused([&] { pool.give_back(first, 8); }), "a block came back from somebody else");
    pool.give_back(first, 7);
    require(is_refused([&] { pool.give_back(first, 7); }), "a block came back twice");
    require(is_refused([&] { pool.give_back(-1, 7); }) && is_refused([&] { pool.give_back(2, 7); }), "no such block");
    require(pool.num_free() == 1, "a refused block changed the pool");
}

}  // namespace

int main(int argc, char** argv) {
    const int num_rounds = argc > 1 ? std::atoi(argv[1]) : 150;
    check_block_pool();
    for (const bool chooses : {false, true}) check_concurrent_streams(num_rounds, chooses);
    check_close_while_busy();
    std::puts("decode_loop_stress: clean");
}
